"""O-LoRA (arXiv 2310.14152): each task's A is kept orthogonal to those of the tasks before it."""

from __future__ import annotations

import torch

from r1p_dist.adapters import Factors, LoRALinear
from r1p_dist.config import Count, NotNegative, Positive, Probability
from r1p_dist.protocol import LowRankMethod, LowRankOptions, Stage, Trainer


class OrthogonalLinear(LoRALinear):
    """A LoRA whose A is penalised for what it shares with past_A, (k, in) of all tasks before."""

    past_A: torch.Tensor | None = None
    weight_of_penalty = 0.0

    def penalty(self, factors: Factors) -> dict[str, torch.Tensor]:
        """Returns weight * sum |A_past A^T|, as the released code has it."""
        if self.past_A is None:
            return {}
        overlap = self.past_A.to(factors.A.dtype) @ factors.A.T
        return {"orthogonal": self.weight_of_penalty * overlap.abs().sum()}


class OLora(LowRankMethod):
    """O-LoRA: a fresh LoRA per task, its A penalised for overlap with past ones; all are summed (arXiv 2310.14152).

    The loss adds weight * sum |A_past A^T| over linears and all pairs of rows, A_past those of all tasks before. The
    released code has it on q and v of language models; its second term, an L2 norm of the new LoRA with a weight of 0,
    is left out.
    """

    paper = "arXiv 2310.14152"
    stores = "A and B of each task"
    layer = OrthogonalLinear
    tiny = {"rank": 4, "dropout": 0.0}
    adapters: list[OrthogonalLinear]

    class Options(LowRankOptions):
        """Options of O-LoRA."""

        rank: Count = 8
        """Rank of the update of each linear."""
        alpha: Positive = 32.0
        """The update's scaling is alpha / rank."""
        dropout: Probability = 0.1
        """Rate of the dropout on the update's input."""
        weight: NotNegative = 0.5
        """Of the penalty on the overlap of A with past ones; the code's lambda_1."""

    options: Options

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        for adapter in self.adapters:
            past = [update.A for update in adapter.merged]
            adapter.past_A = torch.cat(past) if past and self.options.weight else None
            adapter.weight_of_penalty = self.options.weight
