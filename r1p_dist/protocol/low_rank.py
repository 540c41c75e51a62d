"""What methods share that train B A of one LoRA per linear: where it is put, what is trained, what is merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from r1p_dist.adapters import LoRALinear, Routing, Update
from r1p_dist.config import Count, Positive, Probability, Section
from r1p_dist.protocol.method import Method, Stage

if TYPE_CHECKING:
    from r1p_dist.backbones import Slot
    from r1p_dist.data import Stream


class LowRankOptions(Section):
    """Options of a LoRA; the update is alpha / rank * B A."""

    rank: Count = 12
    """Rank of the update of each linear."""
    alpha: Positive = 1.0
    """The update's scaling is alpha / rank."""
    dropout: Probability = 0.0
    """Rate of the dropout on the update's input."""


class LowRankMethod(Method):
    """A LoRA on each linear that `targets` names; each stage begins a fresh one and merges it at its end.

    layer: the class of the adapters; a penalty on A and B is its method `penalty`.
    """

    Options = LowRankOptions
    layer: ClassVar[type[LoRALinear]] = LoRALinear
    options: LowRankOptions
    adapters: list[LoRALinear]

    def build(self) -> None:
        targets = self.config.targets

        def make(slot: Slot, routing: Routing) -> LoRALinear:
            return self.make_adapter(slot)

        self.adapters = self.backbone.attach(make, targets.towers, targets.layers)

    def make_adapter(self, slot: Slot) -> LoRALinear:
        """Returns what is put in a slot."""
        options = self.options
        return self.layer(slot.linear, options.rank, options.alpha, options.dropout, rows=slot.rows)

    def trained(self) -> dict[str, Update]:
        return {adapter.name: adapter.update() for adapter in self.adapters}

    def updates(self) -> dict[str, Update]:
        return self.trained()


class SingleTaskOptions(Section):
    """Option of what a paper trains on one task."""

    together: bool = False
    """All tasks as the paper's one task, in one stage; else one after the other, with a merge after each."""


class SingleTaskMethod(LowRankMethod):
    """A low-rank method whose paper trains one task: that of all tasks together, or on a stream each anew."""

    Options = SingleTaskOptions
    options: SingleTaskOptions

    def stages(self, stream: Stream) -> list[Stage]:
        stages = super().stages(stream)
        return [joint_stage("together", stages, stream)] if self.options.together else stages


def joint_stage(name: str, stages: Sequence[Stage], stream: Stream) -> Stage:
    """Returns one stage of all tasks, with as many iterations as these stages have."""
    return Stage(name, stream.tasks, sum(stage.iterations for stage in stages))
