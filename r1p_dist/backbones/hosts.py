"""The host of a model in one's own loop, by what the model is; the libraries of other kinds are not imported."""

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from r1p_dist.backbones.host import Host
from r1p_dist.backbones.plain import PlainHost
from r1p_dist.errors import InputError
from r1p_dist.kinds import kind_names, kind_of


class OwnLoopPart(Protocol):
    """What the part `own_loop` of a kind holds."""

    def host_of(self, model: nn.Module) -> Host | None:
        """Returns the host of a model, None for one that is not of the kind."""


def find_host(model: nn.Module, targets: str | Sequence[str] | None) -> Host:
    """Returns the host of a model. targets: names of linears, for any model; None: those that its kind has.

    InputError: a model of no kind without targets, or targets that name nothing.
    """
    if targets is not None:
        return PlainHost(model, targets)
    classes = [f"{cls.__module__}." for cls in type(model).__mro__]
    for kind in map(kind_of, kind_names()):
        if any(name.startswith(kind.libraries) for name in classes):
            part: OwnLoopPart = kind.part("own_loop")
            if (host := part.host_of(model)) is not None:
                return host
    raise InputError(
        f"attach_pool: a {type(model).__name__} is of no kind that is known; name its linears, for example "
        "targets=['q_proj', 'v_proj']"
    )
