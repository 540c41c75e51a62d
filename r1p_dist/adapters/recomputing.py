"""Whether a forward is activation checkpointing's second one: votes and sums of the first one stand."""

from typing import TypeVar

import torch

_Countable = TypeVar("_Countable", torch.Tensor, int)
_FIRST, _SECOND = torch.ones((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
_compiled_factor = _FIRST


def is_recomputing() -> bool:
    """Whether this forward runs inside a backward pass; compiled code cannot know and takes it for the first one."""
    return not torch.compiler.is_compiling() and _is_in_backward()


def once(count: _Countable) -> _Countable | torch.Tensor:
    """Returns what is to be added to a sum, so that it is added once.

    In compiled code that is zero in a second forward: checkpointing wants the very same graph in both.
    """
    return count * _compiled_factor if torch.compiler.is_compiling() else count


def note_for_compiled() -> None:
    """Tells compiled code which forward is coming."""
    global _compiled_factor
    _compiled_factor = _SECOND if _is_in_backward() else _FIRST


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
