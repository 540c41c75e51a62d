"""NuSA-CL (arXiv 2510.21175): each task learns in the directions that the weights so far use least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from r1p_dist.adapters import Factors, LoRALinear
from r1p_dist.adapters.low_rank import full_values
from r1p_dist.config import Count, Probability, Section
from r1p_dist.distributed import gathered, owner, rank
from r1p_dist.protocol import LowRankMethod, Stage, Trainer

if TYPE_CHECKING:
    from r1p_dist.backbones import Slot


class NullSpaceLinear(LoRALinear):
    """U M V^T: M (rank, rank) is trained, zero at first; U, here B (out, rank), and V^T, A (rank, in), are frozen."""

    def __init__(self, linear: nn.Linear, rank: int, rows: slice | None) -> None:
        super().__init__(linear, rank, alpha=rank, rows=rows)
        self.directions = rank
        self.A.requires_grad_(False)
        self.B.requires_grad_(False)
        self.M = nn.Parameter(linear.weight.new_zeros(rank, rank))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Begins anew: B and M zero; `set_directions` follows. A collective under ZeRO-3."""
        super().reset(generator)
        if hasattr(self, "M"):  # not yet where LoRALinear is made
            with gathered([self.M], modify=True):
                self.M.zero_()

    @torch.no_grad()
    def set_directions(self, both: torch.Tensor) -> None:
        """Takes U^T and V^T beside one another, (rank, out + in). A collective under ZeRO-3."""
        with gathered([self.A, self.B], modify=True):
            self.B.copy_(both[:, : self.out_features].T)
            self.A.copy_(both[:, self.out_features :])

    @staticmethod
    def factors(adapters: Sequence[NullSpaceLinear], x: torch.Tensor, votes: None) -> list[Factors]:
        return [Factors(adapter.A, adapter.B @ adapter.M, 1.0) for adapter in adapters]

    def update(self) -> Factors:
        A, B, M = full_values(self.A, self.B, self.M)
        return Factors(A, B @ M, 1.0)


class NusaCl(LowRankMethod):
    """NuSA-CL: U M V^T on the weights' trailing singular vectors, M trained, merged after each task (arXiv 2510.21175).

    M is zero at first, U and V stay for the task. Where fewer than `rank` directions lie beyond `energy`, the others of
    U and V are zero. From a summary of the paper, which adapts the projections of attention: set
    targets.layers=[q,k,v,out] for that.
    """

    paper = "arXiv 2510.21175"
    tiny = {"rank": 6, "energy": 0.8}
    adapters: list[NullSpaceLinear]

    class Options(Section):
        """Options of NuSA-CL."""

        rank: Count = 128
        """Directions of each linear at most; never more than it has."""
        energy: Probability = 0.95
        """Share of the squared singular values that the directions before hold; the paper has 0.80 to 0.99."""

    options: Options

    def make_adapter(self, slot: Slot) -> NullSpaceLinear:
        rows = slot.rows or slice(0, slot.linear.out_features)
        size = min(self.options.rank, rows.stop - rows.start, slot.linear.in_features)
        return NullSpaceLinear(slot.linear, size, slot.rows)

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        own = {}  # of the linears that this rank owns, so that all ranks get the same vectors
        for number, adapter in enumerate(self.adapters):
            with gathered([adapter.linear.weight]):
                if rank() == owner(number):
                    weight = adapter.linear.weight[adapter.rows].detach().float()
                    own[adapter.name] = trailing(weight, adapter.directions, self.options.energy)
        directions = trainer.by_layer([adapter.name for adapter in self.adapters], own.__getitem__)
        for adapter in self.adapters:
            adapter.set_directions(directions[adapter.name])


def trailing(weight: torch.Tensor, count: int, energy: float) -> torch.Tensor:
    """Returns the singular vectors of the `count` smallest singular values, (count, out + in), left beside right ones.

    Those that are needed to hold `energy` of the squared values are zeros in it.
    """
    U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
    shares = S.square().cumsum(0) / S.square().sum()
    needed = torch.cat([shares.new_zeros(1), shares[:-1]]) < energy
    both = torch.cat([U.T, Vt], dim=1) * ~needed[:, None]
    return both[len(both) - count :]
