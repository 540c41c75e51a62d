"""EWC (arXiv 1612.00796) on a LoRA that is kept going: what past tasks need is expensive to change."""

from __future__ import annotations

from typing import Literal

import torch

from r1p_dist.adapters import Factors, LoRALinear
from r1p_dist.adapters.low_rank import full_values
from r1p_dist.config import Count, NotNegative, Probability
from r1p_dist.protocol import FisherDiagonal, LowRankMethod, LowRankOptions, Stage, Trainer

FACTORS = ("A", "B")


class EwcLinear(LoRALinear):
    """A LoRA with an anchor and the Fisher's diagonal for each of its numbers; none in the first task."""

    fisher: dict[str, torch.Tensor] | None = None
    anchor: dict[str, torch.Tensor] | None = None
    weight_of_penalty = 0.0

    def penalty(self, factors: Factors) -> dict[str, torch.Tensor]:
        """Returns weight / 2 * sum F (theta - theta*)^2 of this layer."""
        if self.fisher is None or self.anchor is None:
            return {}
        now = {"A": factors.A.float(), "B": factors.B.float()}
        parts = [(self.fisher[name] * (now[name] - self.anchor[name]).square()).sum() for name in FACTORS]
        return {"ewc": self.weight_of_penalty / 2 * torch.stack(parts).sum()}


class Ewc(LowRankMethod):
    """EWC: one LoRA kept going, with a quadratic penalty around where past tasks left it (arXiv 1612.00796).

    The loss adds weight / 2 * sum F (theta - theta*)^2 over all trained numbers, theta* their values after the last
    task. Online form: F <- decay * F + the new task's, one anchor. The paper's F is the mean of squared gradients of
    single samples, `fisher: sample`. By default it is that of whole batches, which costs a batch's size less and is by
    about as much smaller, so the weight depends on it.
    """

    paper = "arXiv 1612.00796"
    stores = "an anchor and a Fisher's diagonal for each trained number"
    layer = EwcLinear
    tiny = {"rank": 4, "batches": 1, "fisher": "sample"}
    adapters: list[EwcLinear]

    class Options(LowRankOptions):
        """Options of EWC."""

        weight: NotNegative = 1e4
        """Of the penalty: lambda."""
        decay: Probability = 0.9
        """What is left of the past Fisher after each task: gamma."""
        batches: Count = 50
        """Global batches that the Fisher of a task is measured on."""
        fisher: Literal["batch", "sample"] = "batch"
        """Of the gradients of whole batches, or of each sample's, at a forward and backward pass for each."""

    options: Options

    def prepare(self, index: int) -> None:
        if index == 0:
            super().prepare(index)

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        past = trainer.past_memory()
        for adapter in self.adapters if past else ():
            device = self.backbone.device
            adapter.fisher = {name: past[-1][f"{adapter.name}.{name}.fisher"].to(device) for name in FACTORS}
            adapter.anchor = {name: past[-1][f"{adapter.name}.{name}.anchor"].to(device) for name in FACTORS}
            adapter.weight_of_penalty = self.options.weight

    def end(self, stage: Stage, trainer: Trainer) -> None:
        fisher = FisherDiagonal(by_sample=self.options.fisher == "sample")
        trainer.scan(fisher, batches=self.options.batches, trained=True)
        self._memory = {}
        for adapter in self.adapters:
            for name, value in zip(FACTORS, full_values(adapter.A, adapter.B), strict=True):
                now = fisher.diagonal[f"{adapter.name}.{name}"]
                before = adapter.fisher[name] if adapter.fisher else torch.zeros_like(now)
                self._memory[f"{adapter.name}.{name}.fisher"] = self.options.decay * before + now
                self._memory[f"{adapter.name}.{name}.anchor"] = value

    def memory(self) -> dict[str, torch.Tensor]:
        return self._memory

    def merged(self, index: int) -> list[int]:
        return []  # the adapter itself holds what was learnt

    def deployed(self, count: int) -> list[int]:
        return super().deployed(count)[-1:]
