"""GatedLinear: a LoRA with a gate for each of its ranks, that thresholds make exactly zero (SoRA, arXiv 2311.11696)."""

from collections.abc import Sequence

import torch
from torch import nn

from r1p_dist.adapters.lora import LoRALinear
from r1p_dist.adapters.low_rank import full_values
from r1p_dist.adapters.merged_weight import Factors
from r1p_dist.distributed import gathered


class GatedLinear(LoRALinear):
    """A frozen linear plus scaling * B diag(gate) A, scaling = alpha / rank; gate (rank,) normal at first."""

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float = 1.0, dropout: float = 0.0, *, rows: slice | None = None
    ):
        super().__init__(linear, rank, alpha, dropout, rows=rows)
        self.gate = nn.Parameter(linear.weight.new_ones(rank))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Begins anew: A and gate random, B zero. A collective under ZeRO-3."""
        super().reset(generator)
        if hasattr(self, "gate"):  # not yet where LoRALinear is made
            with gathered([self.gate], modify=True):
                self.gate.copy_(torch.randn(self.gate.shape, generator=generator))

    @staticmethod
    def factors(adapters: Sequence["GatedLinear"], x: torch.Tensor, votes: None) -> list[Factors]:
        return [Factors(adapter.A, adapter.B * adapter.gate, adapter.scaling) for adapter in adapters]

    def update(self) -> Factors:
        """Returns the ranks whose gate is open, or one where none is. A collective under ZeRO-3."""
        A, B, gate = full_values(self.A, self.B, self.gate)
        kept = gate.nonzero().flatten() if gate.any() else torch.zeros(1, dtype=torch.int64, device=gate.device)
        return Factors(A[kept], B[:, kept] * gate[kept], self.scaling)


def shrink(value: torch.Tensor, threshold: float, is_doubled: bool = False) -> torch.Tensor:
    """Returns sign(value) max(|value| - threshold, 0).

    is_doubled: what is below twice the threshold becomes zero, as in code that tests values one after the other.
    """
    found = value.sign() * (value.abs() - threshold).clamp(min=0)
    return found * (found.abs() >= threshold) if is_doubled else found
