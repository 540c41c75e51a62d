"""XGBLoRA (arXiv 2410.19694): rank-1 boosters on a few layers at a time, merged after some steps each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from r1p_dist.adapters import Factors, LoRALinear
from r1p_dist.adapters.low_rank import full_values
from r1p_dist.config import Count, Positive
from r1p_dist.protocol import SingleTaskMethod, SingleTaskOptions, Stage, Trainer

if TYPE_CHECKING:
    from r1p_dist.backbones import Slot


class BoostedLinear(LoRALinear):
    """scaling * B A of rank 1 where the layer is chosen, on a weight that has the boosters of the task so far.

    boosters: those, as one update, None before the first; is_chosen: else A and B get gradients of zero.
    """

    def __init__(self, linear: nn.Linear, scaling: float, rows: slice | None) -> None:
        super().__init__(linear, 1, scaling, rows=rows)
        self.boosters: Factors | None = None
        self.is_chosen = False

    @staticmethod
    def factors(adapters: Sequence[BoostedLinear], x: torch.Tensor, votes: None) -> list[Factors]:
        return [Factors(adapter.A, adapter.is_chosen * adapter.B, adapter.scaling) for adapter in adapters]

    def update(self) -> Factors:
        """Returns the task's boosters and the one in training. A collective under ZeRO-3."""
        A, B = full_values(self.A, self.B)
        own = Factors(A, self.is_chosen * B, self.scaling)
        if self.boosters is None:
            return own
        return Factors(torch.cat([self.boosters.A, own.A]), torch.cat([self.boosters.B, own.B], dim=1), self.scaling)

    def boost(self) -> None:
        """Merges the booster in training; whoever calls this makes A and B anew. A collective under ZeRO-3."""
        if self.is_chosen:
            self._set_boosters(self.update())

    def _set_boosters(self, boosters: Factors) -> None:
        """Makes these what the weight has beside finished tasks' updates."""
        self.boosters = boosters
        self.set_weight([*self.merged, boosters])

    def set_merged(self, updates: Sequence[Factors]) -> None:
        self.boosters = None  # those of a finished task are among the updates
        super().set_merged(updates)

    def state(self) -> dict[str, torch.Tensor]:
        if self.boosters is None:
            return {"boosters.A": self.past_B.new_zeros(0, self.in_features), "boosters.B": self.past_B[:, :0]}
        return {"boosters.A": self.boosters.A, "boosters.B": self.boosters.B}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        A, B = (state[f"boosters.{name}"].to(self.past_B.device) for name in "AB")
        if len(A):
            self._set_boosters(Factors(A, B, self.scaling))


class XgbLora(SingleTaskMethod):
    """XGBLoRA: every few steps the rank-1 update of some linears is merged and others begin anew (arXiv 2410.19694).

    A booster has fresh A, B and moments; the schedule of the learning rate goes on. The paper trains one task: that
    of all tasks with `together`; else the boosters of each task of a stream are its update. `train.weight_decay`
    stands for the paper's small penalty on A and B. No code was released; how many steps a booster has is a
    reconstruction. Where weights are bf16 a merge rounds them.
    """

    paper = "arXiv 2410.19694"
    columns = ("fresh",)
    tiny = {"every": 1, "linears": 7}
    adapters: list[BoostedLinear]

    class Options(SingleTaskOptions):
        """Options of XGBLoRA."""

        every: Count = 8
        """Steps that a booster is trained for: kappa, small in the paper."""
        linears: Count = 11
        """Linears that have a booster at a time, drawn at random; the paper's L_s, best at 11 for LLaMA3-8B."""
        scaling: Positive = 1.0
        """Of each booster B A."""

    options: Options

    def make_adapter(self, slot: Slot) -> BoostedLinear:
        return BoostedLinear(slot.linear, self.options.scaling, slot.rows)

    def prepare(self, index: int) -> None:
        super().prepare(index)
        self._index = index
        self._choose(0)

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        self._iterations = stage.iterations

    def _choose(self, number: int) -> None:
        """Draws the linears of booster `number` of the task."""
        self._number = number
        order = torch.randperm(len(self.adapters), generator=self.generator(self._index, 0, number)).tolist()
        for place, which in enumerate(order):
            self.adapters[which].is_chosen = place < self.options.linears

    def after_step(self, trainer: Trainer) -> None:
        steps = trainer.step_number + 1
        if steps % self.options.every or steps == self._iterations:
            return
        fresh = {}
        for number, adapter in enumerate(self.adapters):
            adapter.boost()
            bound = 1 / math.sqrt(adapter.in_features)
            generator = self.generator(self._index, 1 + number, self._number)
            fresh[f"{adapter.name}.A"] = torch.empty(1, adapter.in_features).uniform_(
                -bound, bound, generator=generator
            )
            fresh[f"{adapter.name}.B"] = torch.zeros(adapter.out_features, 1)
        trainer.fill_column("fresh", fresh)
        trainer.edit(lambda value, fresh: fresh, "fresh")
        trainer.restart_moments()
        self._choose(self._number + 1)

    def state(self) -> dict[str, torch.Tensor]:
        return super().state() | {"booster": torch.tensor([self._index, self._number])}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        super().load_state(state)
        self._index, number = state["booster"].tolist()
        self._choose(number)
