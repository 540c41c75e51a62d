"""LoRALinear: a frozen linear layer with plain LoRA (Hu et al., arXiv 2106.09685), merged at the end of a task."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from r1p_dist.adapters.low_rank import LowRankLinear, fill_uniform, full_values
from r1p_dist.adapters.merged_weight import Factors
from r1p_dist.distributed import gathered
from r1p_dist.errors import InputError


class LoRALinear(LowRankLinear):
    """A frozen linear plus scaling * B A, scaling = alpha / rank; A (rank, in) random, B (out, rank) zero at first."""

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float = 1.0, dropout: float = 0.0, *, rows: slice | None = None
    ):
        super().__init__(linear, alpha / rank, dropout, rows=rows)
        if rank > min(self.in_features, self.out_features):
            raise InputError(f"options.rank={rank} is larger than a layer of {self.in_features} by {self.out_features}")
        self.A = nn.Parameter(linear.weight.new_empty(rank, self.in_features))
        self.B = nn.Parameter(linear.weight.new_empty(self.out_features, rank))
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Begins anew: A random, B zero. A collective under ZeRO-3."""
        bound = 1 / math.sqrt(self.in_features)
        with gathered(self.parameters(recurse=False), modify=True):
            fill_uniform(self.A, bound, generator)
            nn.init.zeros_(self.B)

    @staticmethod
    def factors(adapters: Sequence["LoRALinear"], x: torch.Tensor, votes: None) -> list[Factors]:
        return [Factors(adapter.A, adapter.B, adapter.scaling) for adapter in adapters]

    def update(self) -> Factors:
        """Returns the whole LoRA as an update of the weight. A collective under ZeRO-3."""
        return Factors(*full_values(self.A, self.B), self.scaling)
