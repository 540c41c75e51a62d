"""SoRA (arXiv 2311.11696): gates on the ranks of a LoRA, and a proximal step that closes those of little use."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from r1p_dist.adapters import Factors, GatedLinear, shrink
from r1p_dist.config import Count, NotNegative, Positive
from r1p_dist.protocol import LowRankOptions, SingleTaskMethod, SingleTaskOptions, Trainer

if TYPE_CHECKING:
    from r1p_dist.backbones import Slot


class SparseGates(GatedLinear):
    """A gated LoRA with a penalty weight * sum |gate|; 0: none."""

    weight_of_penalty = 0.0

    def penalty(self, factors: Factors) -> dict[str, torch.Tensor]:
        return {"sparse": self.weight_of_penalty * self.gate.float().abs().sum()} if self.weight_of_penalty else {}


class SoRa(SingleTaskMethod):
    """SoRA: gated ranks, thresholded after each step; what is still open after a task is merged (arXiv 2311.11696).

    After each step gate <- sign(gate) max(|gate| - lr * sparsity, 0). The released code's constant threshold, with
    values below twice of it zeroed too and a loss on the mean of |gate| beside it, is `proximal: code`; its schedule of
    growing thresholds is left out. The paper trains one task; on a stream each begins anew with all ranks, or
    `together` makes one of all.
    """

    paper = "arXiv 2311.11696"
    tiny = {"rank": 4, "sparsity": 0.5}
    adapters: list[SparseGates]

    class Options(LowRankOptions, SingleTaskOptions):
        """Options of SoRA."""

        rank: Count = 8
        """Rank of the update of each linear before gates close."""
        alpha: Positive = 16.0
        """The update's scaling is alpha / rank."""
        proximal: Literal["paper", "code"] = "paper"
        """Whose proximal step."""
        sparsity: NotNegative = 0.375
        """The paper's lambda; this one gives the code's threshold at its learning rate of 8e-4."""
        threshold: NotNegative = 3e-4
        """Of `code`: its xi, whatever the learning rate."""
        weight: NotNegative = 10.0
        """Of `code`: of the mean of |gate| over all linears, in the loss."""

    options: Options

    def make_adapter(self, slot: Slot) -> SparseGates:
        options = self.options
        return SparseGates(slot.linear, options.rank, options.alpha, options.dropout, rows=slot.rows)

    def build(self) -> None:
        super().build()
        self._gates = {f"{adapter.name}.gate" for adapter in self.adapters}
        for adapter in self.adapters if self.options.proximal == "code" else ():
            adapter.weight_of_penalty = self.options.weight / (len(self.adapters) * self.options.rank)

    def after_step(self, trainer: Trainer) -> None:
        is_code = self.options.proximal == "code"
        threshold = self.options.threshold if is_code else trainer.lr * self.options.sparsity
        trainer.edit(partial(shrink, threshold=threshold, is_doubled=is_code), only=self._gates)
