"""LoDA (arXiv 2603.00191): one branch where past and new inputs lie, one where the new ones alone do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from r1p_dist.adapters import Factors, LoRALinear, Update
from r1p_dist.adapters.low_rank import full_values
from r1p_dist.config import Count, NotNegative, Positive, Section
from r1p_dist.distributed import gathered
from r1p_dist.protocol import InputMoments, LowRankMethod, Stage, Trainer

if TYPE_CHECKING:
    from r1p_dist.backbones import Slot


class BranchesLinear(LoRALinear):
    """w_G B_G A_G + w_I B_I A_I as one product: A (2 k, in) is what was designed, plus in the first task what trains.

    designed: (2 k, in), the general rows above the isolation rows; None before a task's design. The parameter A is the
    distance from it, zero at first, and counts where `trains_A`.
    """

    def __init__(self, linear: nn.Linear, rank: int, weights: tuple[float, float], rows: slice | None) -> None:
        super().__init__(linear, 2 * rank, alpha=2 * rank, rows=rows)
        self.branch_rank = rank
        self.weights = torch.tensor(weights).repeat_interleave(rank).tolist()
        self.designed: torch.Tensor | None = None
        self.trains_A = True

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Begins anew: A and B zero. A collective under ZeRO-3."""
        with gathered([self.A, self.B], modify=True):
            self.A.zero_()
            self.B.zero_()

    @staticmethod
    def factors(adapters: Sequence[BranchesLinear], x: torch.Tensor, votes: None) -> list[Factors]:
        return [adapter.whole(adapter.A, adapter.B) for adapter in adapters]

    def whole(self, A: torch.Tensor, B: torch.Tensor) -> Factors:
        # not left out, but times zero: every parameter has a gradient, at every ZeRO stage
        A = self.trains_A * A
        if self.designed is not None:
            A = self.designed.to(A.dtype) + A
        return Factors(A, B * B.new_tensor(self.weights), 1.0)

    def update(self) -> Factors:
        return self.whole(*full_values(self.A, self.B))


class Loda(LowRankMethod):
    """LoDA: B trains on an A designed from past and new inputs, and merges by what it does to both (arXiv 2603.00191).

    M: second moments of a linear's input. General rows are the leading eigenvectors of M_new + M_past; isolation rows
    span the largest x M_new x / x M_past x; both over sqrt 3. In the first task there are general rows alone, and they
    train. A task is merged with each general rank times 1 - (a M_past a) / (a M_past a + gamma a M_new a), M_new
    measured again, and with isolation ranks whole.

    Deviations: on the linears that `targets` names and both towers, where the paper has a ViT's fused qkv; the
    contrastive loss, not cosine heads with margins; AdamW, not SGD. Gradient-aligned optimisation, whose halves of a
    batch have disjoint classes and a step each, is left out: the contrastive loss does not split so. The ridge on
    M_past is an option, where the code takes what a Cholesky factor needs. A branch has at most half as many ranks as
    a linear is wide.
    """

    paper = "arXiv 2603.00191"
    stores = "a second moment (in, in) per layer input"
    tiny = {"rank": 3, "batches": 2, "ridge": 0.1}
    adapters: list[BranchesLinear]

    class Options(Section):
        """Options of LoDA; the update has no alpha."""

        rank: Count = 32
        """Ranks of each of both branches; the paper has 32, and 64 on ImageNet-R."""
        general: NotNegative = 0.25
        """Weight of the general branch, in training and in the merge."""
        isolation: NotNegative = 0.5
        """Weight of the isolation branch."""
        gamma: NotNegative = 3.0
        """Weight of the new task's inputs in the merge."""
        ridge: Positive = 1e-3
        """In units of past inputs' mean square, what a direction that they lack counts as; else noise would decide."""
        passes: Literal[1, 2] = 1
        """Moments that a task leaves: those before its merge, or as in the released code those after it too."""
        batches: Count | None = None
        """Global batches that inputs are measured on, before and after a task; null: an epoch."""

    options: Options

    def make_adapter(self, slot: Slot) -> BranchesLinear:
        options = self.options
        rows = slot.rows or slice(0, slot.linear.out_features)
        rank = min(options.rank, (rows.stop - rows.start) // 2, slot.linear.in_features // 2)
        return BranchesLinear(slot.linear, rank, (options.general, options.isolation), slot.rows)

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        past = trainer.past_memory()
        self._past = past[-1] if past else None
        inputs = self._measure(trainer, trained=False)
        by_name = {adapter.name: adapter for adapter in self.adapters}

        def design(layer: str) -> torch.Tensor:
            rank, ridge = by_name[layer].branch_rank, self.options.ridge
            return designed_rows(inputs.moments[layer], self._past_moment(layer), rank, ridge)

        for layer, rows in trainer.by_layer(inputs.layers, design).items():
            for name in inputs.layers[layer]:
                by_name[name].designed, by_name[name].trains_A = rows, self._past is None

    def end(self, stage: Stage, trainer: Trainer) -> None:
        inputs = self._measure(trainer, trained=True)
        by_name = {adapter.name: adapter for adapter in self.adapters}

        def kept(layer: str) -> torch.Tensor:
            rows, past = by_name[layer].designed, self._past_moment(layer)
            assert rows is not None  # `begin` has set them
            shares = rows.new_ones(len(rows))
            if past is not None:
                general = slice(by_name[layer].branch_rank)
                shares[general] = kept_shares(rows[general], inputs.moments[layer], past, self.options.gamma)
            return shares

        self._left: dict[str, Factors] = {}
        for layer, shares in trainer.by_layer(inputs.layers, kept).items():
            for name in inputs.layers[layer]:
                update = by_name[name].update()
                self._left[name] = update._replace(B=update.B * shares)
        self._moments = inputs.moments
        if self.options.passes == 2:
            self._add_moments_after_merge(trainer)

    def _add_moments_after_merge(self, trainer: Trainer) -> None:
        for adapter in self.adapters:
            adapter.set_weight([*adapter.merged, self._left[adapter.name]])
        after = self._measure(trainer, trained=False).moments
        self._moments = {layer: moment + after[layer] for layer, moment in self._moments.items()}
        for adapter in self.adapters:
            adapter.set_weight(adapter.merged)

    def updates(self) -> dict[str, Update]:
        return {**self._left}

    def trained(self) -> dict[str, Update]:
        return {adapter.name: adapter.update() for adapter in self.adapters}

    def memory(self) -> dict[str, torch.Tensor]:
        """Returns the sum of all tasks' moments so far."""
        found = {}
        for layer, moment in self._moments.items():
            past = self._past_moment(layer)
            found[f"{layer}.moment"] = moment if past is None else past + moment
        return found

    def _measure(self, trainer: Trainer, trained: bool) -> InputMoments:
        inputs = InputMoments(self.backbone, self.adapters)
        trainer.scan(inputs, batches=self.options.batches, trained=trained)
        return inputs

    def _past_moment(self, layer: str) -> torch.Tensor | None:
        return None if self._past is None else self._past[f"{layer}.moment"].to(self.backbone.device)


def designed_rows(current: torch.Tensor, past: torch.Tensor | None, count: int, ridge: float) -> torch.Tensor:
    """Returns `count` general rows above as many isolation rows, (2 count, in); zeros for those without a past."""
    total = current if past is None else current + past
    general = _leading(total.double(), count)
    isolated = torch.zeros_like(general) if past is None else isolation_columns(current, past, count, ridge)
    return torch.cat([general, isolated], dim=1).T.float() / 3**0.5


def isolation_columns(current: torch.Tensor, past: torch.Tensor, count: int, ridge: float) -> torch.Tensor:
    """Returns an orthonormal basis (in, count), fp64, of what maximises x current x / x past x.

    ridge: added to past's diagonal, in units of its mean.
    """
    current, past = current.double(), past.double()
    floor = ridge * past.diagonal().mean().clamp(min=1e-12) * torch.eye(len(past), dtype=past.dtype, device=past.device)
    L = torch.linalg.cholesky(past + floor)
    half = torch.linalg.solve_triangular(L, current, upper=False)
    white = torch.linalg.solve_triangular(L, half.T, upper=False)
    columns = torch.linalg.solve_triangular(L.T, _leading((white + white.T) / 2, count), upper=True)
    return torch.linalg.qr(columns)[0]


def _leading(moment: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the eigenvectors of the largest eigenvalues, the largest first, (in, count)."""
    return torch.linalg.eigh(moment)[1][:, -count:].flip(1)


def kept_shares(rows: torch.Tensor, current: torch.Tensor, past: torch.Tensor, gamma: float) -> torch.Tensor:
    """Returns 1 - eta of each row a: eta = (a past a) / (a past a + gamma a current a)."""
    of_past, of_current = ((rows @ moment * rows).sum(1) for moment in (past, current))
    return 1 - of_past / (of_past + gamma * of_current + 1e-12)
