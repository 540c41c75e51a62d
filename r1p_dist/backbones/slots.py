"""Slots: the frozen linears of a backbone that can have an adapter, and how adapters are put in them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from r1p_dist.adapters import LowRankLinear, Routing
from r1p_dist.backbones.recompute import set_recompute


@dataclass(frozen=True)
class Slot:
    """A frozen linear, or the rows of one, that can have an adapter."""

    name: str  # tower.block.layer, for example image.0.q
    tower: str
    layer: str
    linear: nn.Linear
    rows: slice | None
    owner: nn.Module
    attribute: str
    input_from: nn.Module | None = None  # computes the linear's input, if the backward may call it again

    def install(self, adapter: LowRankLinear) -> None:
        """Puts the adapter in the place of the linear, or of an earlier adapter."""
        adapter.name = self.name
        self.owner.add_module(self.attribute, adapter)
        if self.input_from is not None:
            set_recompute(adapter, self.input_from)


def fill(
    slots: Iterable[Slot], routing: Mapping[str, Routing], make: Callable[[Slot, Routing], LowRankLinear]
) -> list[LowRankLinear]:
    """Puts `make(slot, the routing of its tower)` in every slot; returns the adapters in the slots' order."""
    adapters = []
    for slot in slots:
        adapter = make(slot, routing[slot.tower])
        slot.install(adapter)
        adapters.append(adapter)
    return adapters
