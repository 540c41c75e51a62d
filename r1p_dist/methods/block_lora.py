"""Block-LoRA (arXiv 2501.16720): blocks of a LoRA share one A, so products of matrices become a sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import model_validator
from torch import nn

from r1p_dist.adapters import Factors, LoRALinear
from r1p_dist.adapters.low_rank import full_values
from r1p_dist.config import Count
from r1p_dist.protocol import LowRankOptions, SingleTaskMethod, SingleTaskOptions

if TYPE_CHECKING:
    from r1p_dist.backbones import Slot


class BlockLinear(LoRALinear):
    """alpha / rank * (sum of B) A: B (blocks, out, k), one for each block, and one A (k, in) for all."""

    def __init__(
        self, linear: nn.Linear, rank: int, blocks: int, alpha: float, dropout: float, rows: slice | None
    ) -> None:
        super().__init__(linear, rank // blocks, alpha / blocks, dropout, rows=rows)
        self.B = nn.Parameter(self.B.new_zeros(blocks, *self.B.shape))

    @staticmethod
    def factors(adapters: Sequence[BlockLinear], x: torch.Tensor, votes: None) -> list[Factors]:
        return [Factors(adapter.A, adapter.B.sum(0), adapter.scaling) for adapter in adapters]

    def update(self) -> Factors:
        A, B = full_values(self.A, self.B)
        return Factors(A, B.sum(0), self.scaling)


class BlockLora(SingleTaskMethod):
    """Block-LoRA: a LoRA in blocks that share one A, begun anew for each task and merged (arXiv 2501.16720).

    The paper trains one task; on a stream each begins anew and is merged at its end, or `together` makes one of all.
    No code was released. Reconstruction: every B is zero at first, so all of a linear stay equal, and the update is
    that of a LoRA of rank / blocks whose B learns `blocks` times as fast. The paper's number of blocks is not known;
    its title has eight arms.
    """

    paper = "arXiv 2501.16720"
    tiny = {"rank": 8, "blocks": 4}

    class Options(LowRankOptions, SingleTaskOptions):
        """Options of Block-LoRA."""

        rank: Count = 16
        """Of all blocks together; the update's own rank is rank / blocks."""
        blocks: Count = 8
        """Up-projections that share one down-projection."""

        @model_validator(mode="after")
        def _check_blocks(self) -> BlockLora.Options:
            if self.rank % self.blocks:
                raise ValueError(f"options.rank={self.rank} must be a multiple of options.blocks={self.blocks}")
            return self

    options: Options

    def make_adapter(self, slot: Slot) -> BlockLinear:
        options = self.options
        return BlockLinear(slot.linear, options.rank, options.blocks, options.alpha, options.dropout, slot.rows)
