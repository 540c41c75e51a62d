"""SLAO, "Merge before Forget" (arXiv 2512.23017): one LoRA is trained on, another is its running merge."""

from __future__ import annotations

import torch

from r1p_dist.adapters import Factors, LoRALinear, Update
from r1p_dist.adapters.low_rank import full_values
from r1p_dist.distributed import gathered
from r1p_dist.protocol import LowRankMethod, Stage, Trainer


class Slao(LowRankMethod):
    """SLAO: each task goes on from the last one's B and orthonormal A; B is averaged in by 1/sqrt(i), A is replaced.

    Task i begins with A <- Q^T of A^T = Q R and with B as the last one left them. At its end the merged pair becomes A
    and B_merged + (B - B_merged) / sqrt(i).

    No code was released; the algorithm is the paper's as summaries quote it, with the sign of each row of A fixed.
    """

    paper = "arXiv 2512.23017"
    stores = "one merged B, and the last task's own pair"
    tiny = {"rank": 4}

    def prepare(self, index: int) -> None:
        if index == 0:
            super().prepare(index)
            return
        for adapter in self.adapters:  # they hold what the task before left
            with gathered([adapter.A], modify=True), torch.no_grad():
                adapter.A.copy_(orthonormal_rows(adapter.A.float()))

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        past = trainer.past_memory()
        self._number = len(past) + 1
        self._merged = {adapter.name: past[-1][f"{adapter.name}.B"] if past else None for adapter in self.adapters}

    def end(self, stage: Stage, trainer: Trainer) -> None:
        self._left = {adapter.name: self._merge(adapter) for adapter in self.adapters}

    def updates(self) -> dict[str, Update]:
        return {**self._left}

    def _merge(self, adapter: LoRALinear) -> Factors:
        A, B = full_values(adapter.A, adapter.B)
        before = self._merged[adapter.name]
        if before is not None:
            B = before.to(B.device).lerp(B, self._number**-0.5)
        return Factors(A, B, adapter.scaling)

    def memory(self) -> dict[str, torch.Tensor]:
        return {f"{name}.B": update.B for name, update in self._left.items()}

    def merged(self, index: int) -> list[int]:
        return []  # the adapters hold the last task's own pair

    def deployed(self, count: int) -> list[int]:
        return super().deployed(count)[-1:]


def orthonormal_rows(A: torch.Tensor) -> torch.Tensor:
    """Returns Q^T of A^T = Q R with a positive diagonal of R, (r, in)."""
    Q, R = torch.linalg.qr(A.T)
    return (Q * torch.where(R.diagonal() < 0, -1.0, 1.0)).T
