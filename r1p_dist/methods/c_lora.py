"""C-LoRA (arXiv 2502.17920): one LoRA for all tasks, routed by a small matrix whose past part is frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from r1p_dist.adapters import Factors, LoRALinear
from r1p_dist.adapters.low_rank import fill_uniform, full_values
from r1p_dist.config import Count, NotNegative, Positive, Section, Share
from r1p_dist.distributed import gathered
from r1p_dist.protocol import LowRankMethod, Stage, Trainer

if TYPE_CHECKING:
    from r1p_dist.backbones import Slot


class RoutedLinear(LoRALinear):
    """B (R_old + R) A with R (r, r), where gradients reach A and B through R alone.

    old: R_old, the sum of past tasks' R; basis: orthonormal columns (r, n) of what it spans, which R is kept from.
    """

    weight_of_penalty = 0.0

    def __init__(self, linear: nn.Linear, rank: int, spread: float, rows: slice) -> None:
        self._spread = spread
        super().__init__(linear, rank, alpha=rank, rows=rows)
        self.R = nn.Parameter(linear.weight.new_zeros(rank, rank))
        self.old: torch.Tensor | None = None
        self.basis: torch.Tensor | None = None

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draws A and B, both not zero, as R is nearly. A collective under ZeRO-3."""
        super().reset(generator)
        with gathered([self.B], modify=True):
            fill_uniform(self.B, 1 / math.sqrt(self.B.shape[1]), generator)

    @torch.no_grad()
    def draw_routing(self, generator: torch.Generator) -> None:
        """Begins a task's R. A collective under ZeRO-3."""
        with gathered([self.R], modify=True):
            self.R.copy_(self._spread * torch.randn(self.R.shape, generator=generator))

    @staticmethod
    def factors(adapters: Sequence[RoutedLinear], x: torch.Tensor, votes: None) -> list[Factors]:
        found = []
        for adapter in adapters:
            A, B = adapter.A, adapter.B @ adapter.R
            if adapter.old is not None:
                past = (adapter.B @ adapter.old.to(B.dtype)).detach()
                A, B = torch.cat([A, A.detach()]), torch.cat([B, past], dim=1)
            found.append(Factors(A, B, 1.0))
        return found

    def penalty(self, factors: Factors) -> dict[str, torch.Tensor]:
        """Returns weight * ||U^T R||_F^2, U the basis of past routing."""
        if self.basis is None:
            return {}
        return {"orthogonal": self.weight_of_penalty * (self.basis.T @ self.R.float()).square().sum()}

    def routing(self, R: torch.Tensor) -> torch.Tensor:
        return R if self.old is None else self.old + R

    def update(self) -> Factors:
        A, B, R = full_values(self.A, self.B, self.R)
        return Factors(A, B @ self.routing(R), 1.0)


class CLora(LowRankMethod):
    """C-LoRA: one A and B for all tasks, and a matrix between them that each task adds to (arXiv 2502.17920).

    W x + stopgrad(B R_old A) x + B R A x: small entries of R slow how A and B drift. The loss adds weight times
    ||U_old^T R||_F^2. No code was released. Reconstructions: U_old as the left singular vectors of R_old with `energy`
    of its squares; R drawn small and B not zero, as nothing would learn else; rank and weight, which we did not find.
    """

    paper = "arXiv 2502.17920"
    stores = "one routing matrix (rank, rank) per linear"
    tiny = {"rank": 4, "spread": 0.1}
    adapters: list[RoutedLinear]

    class Options(Section):
        """Options of C-LoRA; the update has no alpha."""

        rank: Count = 12
        """Rank of the one update of each linear; the paper's is not known."""
        weight: NotNegative = 1.0
        """Of the orthogonal loss on R; the paper's is not known."""
        energy: Share = 0.99
        """Share of the squared singular values of R_old that the basis holds (reconstruction)."""
        spread: Positive = 1e-3
        """Standard deviation of a new R (reconstruction)."""

    options: Options

    def make_adapter(self, slot: Slot) -> RoutedLinear:
        return RoutedLinear(slot.linear, self.options.rank, self.options.spread, slot.rows)

    def prepare(self, index: int) -> None:
        if index == 0:
            super().prepare(index)
        for number, adapter in enumerate(self.adapters):
            adapter.draw_routing(self.generator(index, number, 1))

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        past = trainer.past_memory()
        for adapter in self.adapters if past else ():
            adapter.old = past[-1][f"{adapter.name}.R"].to(self.backbone.device)
            adapter.basis = leading_columns(adapter.old, self.options.energy)
            adapter.weight_of_penalty = self.options.weight

    def memory(self) -> dict[str, torch.Tensor]:
        return {f"{adapter.name}.R": adapter.routing(*full_values(adapter.R)) for adapter in self.adapters}

    def merged(self, index: int) -> list[int]:
        return []  # the adapter itself holds what was learnt

    def deployed(self, count: int) -> list[int]:
        return super().deployed(count)[-1:]


def leading_columns(matrix: torch.Tensor, energy: float) -> torch.Tensor:
    """Returns as many left singular vectors as hold `energy` of the squared singular values, one at least."""
    U, S, _ = torch.linalg.svd(matrix)
    shares = S.square().cumsum(0) / S.square().sum()
    return U[:, : 1 + int((shares < energy).sum())]
