"""LiLoRA, "LoRA in LoRA" (arXiv 2508.06202): tasks share A and a base B, and each adds a small LoRA of its own to B."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import nn

from r1p_dist.adapters import Factors, LoRALinear
from r1p_dist.adapters.low_rank import fill_uniform, full_values
from r1p_dist.config import Count, NotNegative, Positive
from r1p_dist.distributed import gathered
from r1p_dist.protocol import LowRankMethod, LowRankOptions, Stage, Trainer

if TYPE_CHECKING:
    from r1p_dist.backbones import Slot
    from r1p_dist.data import Stream, Task


class Own(NamedTuple):
    """What a task has of its own in a linear: E_a (sub_rank, rank), E_b (out, sub_rank), the fusion number (1,)."""

    Ea: torch.Tensor
    Eb: torch.Tensor
    fusion: torch.Tensor


class NestedLinear(LoRALinear):
    """scaling * [f B + (1 - f) E_b E_a] A, f = sigmoid(fusion): A and the base B of all tasks, the rest of one.

    start: B as the task found it, and before: E_b E_a of the task before it; None in the first task. is_frozen: B stays
    at start.
    """

    start: torch.Tensor | None = None
    before: torch.Tensor | None = None
    weight_of_penalty = 0.0
    is_frozen = False

    def __init__(
        self, linear: nn.Linear, rank: int, sub_rank: int, alpha: float, dropout: float, rows: slice | None
    ) -> None:
        super().__init__(linear, rank, alpha, dropout, rows=rows)
        weight = linear.weight
        self.Ea = nn.Parameter(weight.new_zeros(sub_rank, rank))
        self.Eb = nn.Parameter(weight.new_zeros(self.out_features, sub_rank))
        self.fusion = nn.Parameter(weight.new_zeros(1))

    @torch.no_grad()
    def begin_task(self, generator: torch.Generator) -> None:
        """Draws what a task has of its own. A collective under ZeRO-3."""
        with gathered([self.Ea, self.Eb, self.fusion], modify=True):
            fill_uniform(self.Ea, self.Ea.shape[1] ** -0.5, generator)
            self.Eb.zero_()
            self.fusion.copy_(torch.randn(1, generator=generator))

    def base(self, B: torch.Tensor) -> torch.Tensor:
        # times zero, not left out: every parameter has a gradient, at every ZeRO stage
        return self.start.to(B.dtype) + 0 * B if self.is_frozen and self.start is not None else B

    def whole(self, A: torch.Tensor, B: torch.Tensor, own: Own) -> Factors:
        """Returns a task's update of the weight."""
        share = own.fusion.sigmoid()
        return Factors(A, share * self.base(B) + (1 - share) * (own.Eb @ own.Ea), self.scaling)

    @staticmethod
    def factors(adapters: Sequence[NestedLinear], x: torch.Tensor, votes: None) -> list[Factors]:
        return [a.whole(a.A, a.B, Own(a.Ea, a.Eb, a.fusion)) for a in adapters]

    def penalty(self, factors: Factors) -> dict[str, torch.Tensor]:
        """Returns weight * (1 - cos(E_b E_a, that of the task before)) * ||B - start||_F^2."""
        if self.start is None or self.before is None or not self.weight_of_penalty:
            return {}
        own = (self.Eb @ self.Ea).float().flatten()
        alike = F.cosine_similarity(own, self.before.flatten(), dim=0)
        moved = (self.B.float() - self.start).square().sum()
        return {"base": self.weight_of_penalty * (1 - alike) * moved}

    def own(self) -> Own:
        return Own._make(full_values(self.Ea, self.Eb, self.fusion))

    def update(self) -> Factors:
        A, B = full_values(self.A, self.B)
        return self.whole(A, B, self.own())


class Lilora(LowRankMethod):
    """LiLoRA: a LoRA whose B is a base of all tasks plus a small LoRA of each, by the task id (arXiv 2508.06202).

    The loss adds weight * (1 - sim) * ||B - B_before||^2 of each linear, sim the cosine of the tasks' own parts. The
    released code has no such term: B trains in the first task alone (`base: frozen`). A trains on in every task, so
    past tasks change with it. Sum over linears and weight are reconstructions. A task that was not trained yet gets the
    pretrained model. Without `task_ids` every task gets the last one's.
    """

    paper = "arXiv 2508.06202"
    stores = "B, and of each task a small LoRA of it and a fusion number per linear"
    inference = "task_id"
    tiny = {"rank": 4, "sub_rank": 2, "alpha": 4.0}
    adapters: list[NestedLinear]

    class Options(LowRankOptions):
        """Options of LiLoRA."""

        rank: Count = 128
        """Rank of the update of each linear."""
        alpha: Positive = 256.0
        """The update's scaling is alpha / rank."""
        sub_rank: Count = 64
        """Rank of what each task adds to B."""
        base: Literal["regularised", "frozen"] = "regularised"
        """How B is kept: by the loss, as in the paper, or frozen after the first task, as in the released code."""
        weight: NotNegative = 1.0
        """Of that loss; the paper's is not known."""
        task_ids: bool = True
        """Whether the task of each sample is known at inference."""

        @model_validator(mode="after")
        def _check_ranks(self) -> Lilora.Options:
            if self.sub_rank > self.rank:
                raise ValueError(f"options.sub_rank={self.sub_rank} must not be larger than options.rank={self.rank}")
            return self

    options: Options

    def build(self) -> None:
        super().build()
        if not self.options.task_ids:
            self.inference = "merged"  # pyright: ignore[reportAttributeAccessIssue]

    def make_adapter(self, slot: Slot) -> NestedLinear:
        options = self.options
        adapter = NestedLinear(slot.linear, options.rank, options.sub_rank, options.alpha, options.dropout, slot.rows)
        adapter.is_frozen = options.base == "frozen"
        adapter.weight_of_penalty = 0.0 if adapter.is_frozen else options.weight
        return adapter

    def stages(self, stream: Stream) -> list[Stage]:
        stages = super().stages(stream)
        self._stage_of = {task.name: number for number, stage in enumerate(stages) for task in stage.tasks}
        return stages

    def prepare(self, index: int) -> None:
        if index == 0:
            super().prepare(index)
        for number, adapter in enumerate(self.adapters):
            adapter.begin_task(self.generator(index, number, 1))

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        self._past = trainer.past_memory()
        for adapter in self.adapters if self._past else ():
            before = self._own(self._past[-1], adapter)
            adapter.before = before.Eb @ before.Ea
            adapter.start = self._past[-1][f"{adapter.name}.base"].to(self.backbone.device)

    def _own(self, memory: Mapping[str, torch.Tensor], adapter: NestedLinear) -> Own:
        return Own._make(memory[f"{adapter.name}.{part}"].to(self.backbone.device) for part in Own._fields)

    def memory(self) -> dict[str, torch.Tensor]:
        found = {}
        for adapter in self.adapters:
            parts = adapter.own()._asdict() | {"base": adapter.base(*full_values(adapter.B))}
            found |= {f"{adapter.name}.{part}": value for part, value in parts.items()}
        return found

    def merged(self, index: int) -> list[int]:
        return []  # the adapter itself holds what was learnt

    def deployed(self, count: int) -> list[int]:
        return super().deployed(count)[-1:]

    @contextmanager
    def select(self, task: Task) -> Iterator[None]:
        """A context with the weights of a task's own part, and A and B as they are by now."""
        number = self._stage_of[task.name]
        if not self.options.task_ids:
            yield
            return
        for adapter in self.adapters:
            adapter.set_weight(self._updates_of(number, adapter))
        yield
        for adapter in self.adapters:
            adapter.set_weight(adapter.merged)

    def _updates_of(self, number: int, adapter: NestedLinear) -> list[Factors]:
        if number > len(self._past):
            return []
        if number == len(self._past):
            return [adapter.update()]
        A, B = full_values(adapter.A, adapter.B)
        return [adapter.whole(A, B, self._own(self._past[number], adapter))]
