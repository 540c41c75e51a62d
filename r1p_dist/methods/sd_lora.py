"""SD-LoRA (arXiv 2501.13198): directions of past updates stay, their magnitudes are trained again in every task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from r1p_dist.adapters import Factors, LoRALinear
from r1p_dist.adapters.low_rank import full_values
from r1p_dist.config import Count, Positive, Section
from r1p_dist.distributed import gathered
from r1p_dist.errors import InputError
from r1p_dist.protocol import LowRankMethod, Stage, Trainer

if TYPE_CHECKING:
    from r1p_dist.backbones import Slot
    from r1p_dist.backbones.backbone import Batch
    from r1p_dist.data import Stream


class ScaledLinear(LoRALinear):
    """sum over past tasks i of m_i B_i A_i / (||B_i|| ||A_i||) + m_t B A: A, B and all magnitudes m are trained.

    past: A_i / ||A_i|| and B_i / ||B_i|| of each past task. magnitudes (tasks,); those of later tasks are not used.
    """

    def __init__(self, linear: nn.Linear, rank: int, tasks: int, magnitude: float, rows: slice) -> None:
        self._first = magnitude
        super().__init__(linear, rank, alpha=rank, rows=rows)
        self.magnitudes = nn.Parameter(linear.weight.new_full((tasks,), magnitude))
        self.past: list[tuple[torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Begins a task: fresh A and B, all magnitudes as at first. A collective under ZeRO-3."""
        super().reset(generator)
        if hasattr(self, "magnitudes"):
            with gathered([self.magnitudes], modify=True):
                self.magnitudes.fill_(self._first)

    @staticmethod
    def factors(adapters: Sequence[ScaledLinear], x: torch.Tensor, votes: None) -> list[Factors]:
        return [adapter.whole(adapter.A, adapter.B, adapter.magnitudes) for adapter in adapters]

    def whole(self, A: torch.Tensor, B: torch.Tensor, magnitudes: torch.Tensor) -> Factors:
        """Returns all tasks' updates as one, of rank (tasks so far) * rank."""
        columns = [*(past_B for _, past_B in self.past), B]
        scaled = [m * column for m, column in zip(magnitudes, columns, strict=False)]
        return Factors(torch.cat([*(past_A for past_A, _ in self.past), A]), torch.cat(scaled, dim=1), 1.0)

    def update(self) -> Factors:
        return self.whole(*full_values(self.A, self.B, self.magnitudes))


class SdLora(LowRankMethod):
    """SD-LoRA: past directions are frozen, their magnitudes train on with each new LoRA (arXiv 2501.13198).

    A magnitude for each task and linear, as the paper has it; `shared` ties them over linears as the released code
    does. Each task begins with all of them at `magnitude` again, as in that code. A step costs the rank of all tasks.
    The variants RR (falling ranks) and KD (directions folded into past ones) are left out, as is the code's
    orthogonality loss, which is switched off there.
    """

    paper = "arXiv 2501.13198"
    stores = "A and B of each task, and in each task's update those of all before"
    tiny = {"rank": 4}
    adapters: list[ScaledLinear]

    class Options(Section):
        """Options of SD-LoRA; the update has no alpha."""

        rank: Count = 10
        """Rank of each task's update of each linear."""
        magnitude: Positive = 0.8
        """Of every direction at the beginning of a task."""
        tasks: Count = 20
        """Directions that a linear has room for."""
        shared: bool = False
        """One magnitude per task for all linears, as in the released code."""

    options: Options

    def make_adapter(self, slot: Slot) -> ScaledLinear:
        options = self.options
        return ScaledLinear(slot.linear, options.rank, options.tasks, options.magnitude, slot.rows)

    def stages(self, stream: Stream) -> list[Stage]:
        stages = super().stages(stream)
        if len(stages) > self.options.tasks:
            raise InputError(f"options.tasks={self.options.tasks}: the stream has {len(stages)}; give as many at least")
        return stages

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        device, past = self.backbone.device, trainer.past_memory()
        for adapter in self.adapters:
            A, B = f"{adapter.name}.A", f"{adapter.name}.B"
            adapter.past = [(memory[A].to(device), memory[B].to(device)) for memory in past]

    def step(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        if not self.options.shared:
            super().step(trainer, batches)
            return
        micro = [trainer.gradients(batch) for batch in batches]
        gradients = {name: torch.stack([part[name] for part in micro]).mean(0) for name in micro[0]}
        tied = [name for name in gradients if name.endswith(".magnitudes")]
        total = torch.stack([gradients[name] for name in tied]).sum(0)  # equal values stay equal
        trainer.backward_gradients(gradients | dict.fromkeys(tied, total))
        trainer.update()

    def memory(self) -> dict[str, torch.Tensor]:
        directions = {}
        for adapter in self.adapters:
            for name, value in zip("AB", full_values(adapter.A, adapter.B), strict=True):
                directions[f"{adapter.name}.{name}"] = value / value.norm().clamp(min=1e-12)
        return directions

    def merged(self, index: int) -> list[int]:
        return []  # past updates are scaled in training

    def deployed(self, count: int) -> list[int]:
        return super().deployed(count)[-1:]
