"""Models in one's own loop: where adapters go in them, what their routers are told of a batch, and the way back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

from torch import nn

from r1p_dist.adapters import LowRankLinear, Routing
from r1p_dist.backbones.slots import Slot, fill


class Host:
    """A model that its user calls, with adapters on its linears.

    model: as it was given. towers, default_towers, layers: what adapters can be put on, and on which towers they are
    put unless others are named. even_towers: those that run as often on every rank. routing: of each tower. guides: by
    tower, the vectors that its routers can read where a method's options do not say, the default first.
    """

    towers: tuple[str, ...]
    default_towers: tuple[str, ...]
    even_towers: tuple[str, ...]
    layers: tuple[str, ...]
    guides: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    routing: dict[str, Routing]

    def __init__(self, model: nn.Module):
        self.model = model
        self._slots: list[Slot] = []
        self._trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        model.requires_grad_(False)

    def slots(self, towers: Sequence[str], layers: Sequence[str]) -> Iterator[Slot]:
        """Yields the linears that can have adapters. InputError: there are none."""
        raise NotImplementedError

    def attach(
        self, make: Callable[[Slot, Routing], LowRankLinear], towers: Sequence[str], layers: Sequence[str]
    ) -> list[LowRankLinear]:
        """Puts `make(slot, routing)` on its linears; returns the adapters in the order of `slots`."""
        self._slots = list(self.slots(towers, layers))
        return fill(self._slots, self.routing, make)

    def train(self, mode: bool) -> None:
        """Is told that the model was put into training or evaluation mode."""

    def close(self) -> nn.Module:
        """Takes the adapters away and returns the plain model, with the weights that it has now."""
        for slot in self._slots:
            if slot.rows is None:
                slot.owner.add_module(slot.attribute, slot.linear)
            else:
                slot.owner._modules.pop(slot.attribute, None)
        for parameter, is_trained in self._trained:
            parameter.requires_grad_(is_trained)
        return self.model

    def undo(self) -> None:
        """Makes the model what it was when it was given, after an error."""
        self.close()
