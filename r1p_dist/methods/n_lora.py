"""N-LoRA (arXiv 2410.10179): sparse updates seldom change the same weights as those before them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch

from r1p_dist.adapters import Factors, LoRALinear
from r1p_dist.config import Count, NotNegative, Positive, Probability
from r1p_dist.errors import InputError
from r1p_dist.protocol import LowRankMethod, LowRankOptions

if TYPE_CHECKING:
    from r1p_dist.backbones import Slot

_CHUNK_ELEMENTS = 1 << 20  # of B A at a time, which is as large as the weight


class _Sparsity(torch.autograd.Function):
    """sum |B A|: A (k, in), B (out, k); the product is made in parts, and again in the backward."""

    @staticmethod
    def forward(ctx, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(A, B)
        return torch.stack([(rows @ A).abs().sum() for rows in _parts(A, B)]).sum()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        A, B = ctx.saved_tensors
        dA, dB = torch.zeros_like(A), []
        for rows in _parts(A, B):
            signs = (rows @ A).sign()
            dA.addmm_(rows.T, signs)
            dB.append(signs @ A.T)
        return gradient * dA, gradient * torch.cat(dB)


def _parts(A: torch.Tensor, B: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from B.split(max(1, _CHUNK_ELEMENTS // A.shape[1]))


class SparseLinear(LoRALinear):
    """A LoRA with a penalty weight * ||B A||_1; of_code: ||A B||_1, (r, r)."""

    weight_of_penalty = 0.0
    of_code = False

    def penalty(self, factors: Factors) -> dict[str, torch.Tensor]:
        """Returns weight * the sum of absolute values of the update without its scaling."""
        A, B = factors.A.float(), factors.B.float()
        size = (A @ B).abs().sum() if self.of_code else _Sparsity.apply(A, B)
        return {"sparse": self.weight_of_penalty * size}


class NLora(LowRankMethod):
    """N-LoRA: a fresh LoRA per task, kept sparse so that tasks change other weights; all are summed (arXiv 2410.10179).

    The loss adds weight times the sum over linears of ||B A||_1. The released code has ||A B||_1 instead, of a matrix
    (rank, rank) that is there only where a linear is as wide as its input.
    """

    paper = "arXiv 2410.10179"
    stores = "A and B of each task"
    tiny = {"rank": 4, "weight": 0.01, "dropout": 0.0}
    adapters: list[SparseLinear]

    class Options(LowRankOptions):
        """Options of N-LoRA."""

        rank: Count = 8
        """Rank of the update of each linear."""
        alpha: Positive = 32.0
        """The update's scaling is alpha / rank."""
        dropout: Probability = 0.1
        """Rate of the dropout on the update's input."""
        weight: NotNegative = 0.4
        """Of the penalty: lambda; the paper has 0.4 to 1.8 by the order of tasks."""
        norm: Literal["paper", "code"] = "paper"
        """Of B A, as in the paper, or of A B, as in the released code."""

    options: Options

    def make_adapter(self, slot: Slot) -> SparseLinear:
        options = self.options
        adapter = SparseLinear(slot.linear, options.rank, options.alpha, options.dropout, rows=slot.rows)
        adapter.weight_of_penalty, adapter.of_code = options.weight, options.norm == "code"
        if adapter.of_code and adapter.in_features != adapter.out_features:
            raise InputError(
                f"options.norm=code: {slot.name} is {adapter.out_features} by {adapter.in_features} and A B needs as "
                "many outputs as inputs; leave it out of targets.layers or use options.norm=paper"
            )
        return adapter
