"""InfLoRA (arXiv 2404.00228): A is designed before each task to miss what past tasks' inputs span, and B is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import model_validator

from r1p_dist.adapters import LoRALinear
from r1p_dist.config import Count, Probability, Section, Share
from r1p_dist.distributed import gathered, owner, rank
from r1p_dist.protocol import InputMoments, LowRankMethod, Stage, Trainer

if TYPE_CHECKING:
    from r1p_dist.backbones import Slot


class InfLora(LowRankMethod):
    """InfLoRA: trains B alone, with an A that misses the directions past inputs need (arXiv 2404.00228).

    Rows of A: the leading left singular vectors of C - M M^T C over sqrt 3, C the second moment of a linear's input, M
    the basis of past ones. After a task M takes further directions until it holds the share of the squared singular
    values of the new C (DualGPM); with over half of all directions, those left free are kept in its place.

    On the linears that `targets` names; the released code has it on k and v of a ViT, with a growing classifier.
    """

    paper = "arXiv 2404.00228"
    stores = "a basis of at most in / 2 columns per layer input"
    tiny = {"rank": 4, "batches": 2}

    class Options(Section):
        """Options of InfLoRA; the update is B A, without alpha."""

        rank: Count = 10
        """Rank of the update of each linear."""
        first_threshold: Probability = 0.98
        """Share of the inputs' squared energy that the first task's basis must hold."""
        last_threshold: Share = 1.0
        """What the share grows towards: task i of n has i - 1 nths of the way."""
        batches: Count | None = None
        """Global batches that inputs are measured on, before and after a task; null: an epoch."""

        @model_validator(mode="after")
        def _check_thresholds(self) -> InfLora.Options:
            if self.first_threshold > self.last_threshold:
                raise ValueError(
                    f"options.first_threshold={self.first_threshold} must not be larger than "
                    f"options.last_threshold={self.last_threshold}"
                )
            return self

    options: Options

    def make_adapter(self, slot: Slot) -> LoRALinear:
        adapter = LoRALinear(slot.linear, self.options.rank, alpha=self.options.rank, rows=slot.rows)
        adapter.A.requires_grad_(False)
        return adapter

    def stages(self, stream) -> list[Stage]:
        stages = super().stages(stream)
        self._count = len(stages)
        return stages

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        self._past = trainer.past_memory()
        inputs = self._measure(trainer, trained=False)

        def design(layer: str) -> torch.Tensor:
            return leading(free_part(inputs.moments[layer], self._basis(layer)), self.options.rank).T / 3**0.5

        by_name = {adapter.name: adapter for adapter in self.adapters}
        for layer, A in trainer.by_layer(inputs.layers, design).items():
            for name in inputs.layers[layer]:
                with gathered([by_name[name].A], modify=True), torch.no_grad():
                    by_name[name].A.copy_(A)

    def end(self, stage: Stage, trainer: Trainer) -> None:
        inputs = self._measure(trainer, trained=True)
        first, last = self.options.first_threshold, self.options.last_threshold
        threshold = first + (last - first) * len(self._past) / self._count
        self._memory = {}
        for number, layer in enumerate(inputs.layers):
            if rank() == owner(number):
                basis = grow(inputs.moments[layer], self._basis(layer), threshold)
                self._memory[f"{layer}.basis"], self._memory[f"{layer}.free"] = (
                    basis.columns,
                    torch.tensor(basis.is_free),
                )

    def _measure(self, trainer: Trainer, trained: bool) -> InputMoments:
        inputs = InputMoments(self.backbone, self.adapters)
        trainer.scan(inputs, batches=self.options.batches, trained=trained)
        return inputs

    def _basis(self, layer: str) -> Basis | None:
        if not self._past:
            return None
        columns, is_free = (self._past[-1][f"{layer}.{key}"].to(self.backbone.device) for key in ("basis", "free"))
        return Basis(columns, bool(is_free))

    def memory(self) -> dict[str, torch.Tensor]:
        return self._memory


class Basis:
    """Orthonormal columns (in, k) of what past inputs span, or with `is_free` of what they leave free."""

    def __init__(self, columns: torch.Tensor, is_free: bool = False) -> None:
        self.columns, self.is_free = columns, is_free


def free_part(moment: torch.Tensor, basis: Basis | None) -> torch.Tensor:
    """Returns what of a second moment (in, in) lies in the free directions."""
    if basis is None:
        return moment
    inside = basis.columns @ (basis.columns.T @ moment)
    return inside if basis.is_free else moment - inside


def leading(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the left singular vectors of the `count` largest singular values, (in, count)."""
    return torch.linalg.svd(matrix)[0][:, :count]


def grow(moment: torch.Tensor, basis: Basis | None, threshold: float) -> Basis:
    """Returns the basis after a task with this second moment (DualGPM): it holds `threshold` of the squared energy.

    Where it has more than half of all directions, the free ones are kept instead.
    """
    total = torch.linalg.svdvals(moment).square().sum()
    U, S, _ = torch.linalg.svd(free_part(moment, basis))
    shares = S.square() / total
    if basis is None:
        count = max(1, int((shares.cumsum(0) < threshold).sum()))
        basis = Basis(U[:, :count])
    elif not basis.is_free:
        held = 1 - shares.sum()
        count = int((held + shares.cumsum(0) - shares < threshold).sum())
        basis = Basis(torch.cat([basis.columns, U[:, :count]], dim=1)[:, : len(moment)])
    else:
        count = int((shares.sum() - (shares.cumsum(0) - shares) >= 1 - threshold).sum())
        count = min(count, basis.columns.shape[1] - 1)
        rest = basis.columns - U[:, :count] @ (U[:, :count].T @ basis.columns)
        basis = Basis(torch.linalg.svd(rest)[0][:, : basis.columns.shape[1] - count], True)
    if not basis.is_free and basis.columns.shape[1] > len(moment) / 2:
        basis = Basis(torch.linalg.svd(basis.columns)[0][:, basis.columns.shape[1] :], True)
    return basis
