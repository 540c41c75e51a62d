"""Where DeepSpeed keeps the fp32 value and the Adam moments of a trainable parameter, at every ZeRO stage.

DeepSpeed's own accessors are collectives, one for each tensor. Here a rank finds its own part of each parameter, to be
copied or overwritten where it lies.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from r1p_dist.distributed import rank

COLUMNS = ("value", "exp_avg", "exp_avg_sq")


class Part(NamedTuple):
    """This rank's elements start … of a flattened parameter: flat fp32 views that can be written, by column."""

    start: int
    columns: dict[str, torch.Tensor]

    def fill(self, column: str, whole: torch.Tensor) -> None:
        """Sets this rank's elements of a column from the full tensor."""
        target = self.columns[column]
        target.copy_(whole.reshape(-1)[self.start : self.start + len(target)])


def part_of(engine: Any, parameter: nn.Parameter, columns: Sequence[str] = COLUMNS) -> Part | None:
    """Returns what this rank keeps of a trainable parameter; None where it keeps nothing of it.

    engine: a DeepSpeed engine with AdamW. columns: value, its moments and others, which a method keeps beside them;
    what is not there yet is made, as zeros.
    """
    optimizer = engine.optimizer
    if hasattr(parameter, "ds_id"):  # ZeRO-3: an equal share of every parameter on each rank, the last ones padded
        group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat, start = optimizer.fp32_partitioned_groups_flat[group], rank() * count
        count = min(count, parameter.ds_numel - start)
    elif hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2: an equal share of all parameters behind one another
        fragment = parameter._hp_mapping
        if fragment is None:
            return None
        flat = optimizer.single_partition_of_fp32_groups[fragment.param_group_index]
        start, address = fragment.lp_fragment_address.start, fragment.hp_fragment_address
        offset, count = address.start, address.numel
    else:
        flat, start, offset, count = _master(optimizer, parameter), 0, 0, parameter.numel()
    if count <= 0:
        return None
    state = _adam_state(optimizer, flat)
    for column in columns:
        if column != "value" and column not in state:
            state[column] = torch.zeros_like(flat)
    whole = {column: flat.detach() if column == "value" else state[column] for column in columns}
    return Part(start, {column: tensor.view(-1).narrow(0, offset, count) for column, tensor in whole.items()})


def adam_steps(engine: Any) -> int:
    """Returns how many updates the optimizer has made; fewer than steps where DeepSpeed skipped some."""
    states = list(_adam(engine.optimizer).state.values())
    return int(states[0]["step"]) if states and "step" in states[0] else 0


def set_adam_steps(engine: Any, steps: int) -> None:
    """Sets the number of updates, which the bias correction of the moments depends on."""
    for state in _adam(engine.optimizer).state.values():
        state["step"].fill_(steps)


def _adam(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _master(optimizer: Any, parameter: nn.Parameter) -> torch.Tensor:
    """Returns the fp32 copy that stage 0 keeps of a bf16 parameter; an fp32 one is its own."""
    for lower, upper in zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True):
        for low, high in zip(lower, upper, strict=True):
            if low is parameter:
                return high
    return parameter


def _adam_state(optimizer: Any, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    state = _adam(optimizer).state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
    return state
