"""Ortho-LoRA (arXiv 2601.09684): a LoRA on batches of several tasks, whose gradients are kept from conflicting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from r1p_dist.config import Count
from r1p_dist.protocol import DataRequest, LowRankMethod, LowRankOptions, Stage, Trainer, joint_stage

if TYPE_CHECKING:
    from r1p_dist.backbones.backbone import Batch
    from r1p_dist.data import Stream, Task


class OrthoLora(LowRankMethod):
    """Ortho-LoRA: a batch of every task in each step; of each A and B, gradients that conflict are made orthogonal.

    For the gradients g_i of the tasks, matrix by matrix, and each other task j in random order: where <g_i, g_j> < 0,
    g_i <- g_i - <g_i, g_j> / ||g_j||^2 g_j, with g_j as it was. The step is their mean.

    A multi-task method, so by default it trains all tasks in one stage. Task by task is a use of ours: a fresh LoRA for
    each task, whose steps have a batch of every past task beside that of the new one. No code was released: the
    projection is that of PCGrad, done for every matrix by itself, and the tasks' gradients are averaged. A step costs
    as much as the tasks' steps.
    """

    paper = "arXiv 2601.09684"
    stores = "nothing; task by task, the samples of each task that `kept` says"
    tiny = {"rank": 4}

    class Options(LowRankOptions):
        """Options of Ortho-LoRA."""

        together: bool = True
        """All tasks in one stage, as in the paper; else one after the other, with a merge after each."""
        kept: Count | None = None
        """Task by task: samples kept of each class, or of each task of conversations; null: all."""

    options: Options

    def stages(self, stream: Stream) -> list[Stage]:
        self._stages = super().stages(stream)
        if self.options.together:
            whole = joint_stage("together", self._stages, stream)
            # a step has a batch of every task
            self._stages = [replace(whole, iterations=max(1, whole.iterations // len(stream.tasks)))]
        return self._stages

    def further_data(self, stage: Stage, past: Sequence[Task]) -> dict[str, DataRequest]:
        requests = {task.name: DataRequest((task,), self.options.kept) for task in past}
        return requests | {task.name: DataRequest((task,)) for task in stage.tasks}

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        past = self._stages[: len(trainer.past_memory())]
        self._tasks = list(dict.fromkeys(task.name for reached in (*past, stage) for task in reached.tasks))

    def step(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        by_task = []
        for task in self._tasks:
            micro = [trainer.gradients(batch) for batch in trainer.next_batches(task)]
            by_task.append({name: torch.stack([part[name] for part in micro]).mean(0) for name in micro[0]})
        order = self.generator(trainer.step_number)
        projected = {name: project([task[name] for task in by_task], order) for name in by_task[0]}
        trainer.backward_gradients(projected)
        trainer.update()


def project(gradients: Sequence[torch.Tensor], order: torch.Generator) -> torch.Tensor:
    """Returns the mean of one matrix' gradients, each freed from what conflicts with the others' (their original ones).

    order: draws the order in which the others are met.
    """
    found = []
    for number, gradient in enumerate(gradients):
        own = gradient.clone()
        for other in torch.randperm(len(gradients), generator=order).tolist():
            if other != number:
                against = gradients[other]
                overlap = (own * against).sum()
                own -= overlap.clamp(max=0) / against.square().sum().clamp(min=1e-12) * against
        found.append(own)
    return torch.stack(found).mean(0)
