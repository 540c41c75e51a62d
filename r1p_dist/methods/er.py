"""Experience replay (arXiv 1902.10486): what was kept of past tasks is trained on beside the new one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from r1p_dist.config import Count, NotNegative
from r1p_dist.protocol import DataRequest, LowRankMethod, LowRankOptions, Stage, Trainer

if TYPE_CHECKING:
    from r1p_dist.backbones.backbone import Batch
    from r1p_dist.data import Task


class Er(LowRankMethod):
    """Experience replay: one LoRA kept going, each step with a second batch of past samples (arXiv 1902.10486).

    The loss adds weight times that of the second batch; of prompts and pictures each batch is contrasted by itself,
    where the paper has one batch of both and a classifier. Samples are drawn from all past ones alike. The memory is
    filled by class, not by the paper's reservoir: a run can read each past sample again, so nothing is copied.
    """

    paper = "arXiv 1902.10486"
    stores = "the samples of each task that `kept` says"
    tiny = {"rank": 4}

    class Options(LowRankOptions):
        """Options of experience replay."""

        weight: NotNegative = 1.0
        """Of the replayed batch's loss; 1 counts a past sample like a new one."""
        kept: Count | None = None
        """Samples kept of each class, or of each task of conversations; null: all that the tasks were trained on."""

    options: Options

    def further_data(self, stage: Stage, past: Sequence[Task]) -> dict[str, DataRequest]:
        return {"replay": DataRequest(tuple(past), self.options.kept)} if past else {}

    def prepare(self, index: int) -> None:
        if index == 0:
            super().prepare(index)

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        self._has_past = bool(trainer.past_memory())
        self._replayed: Iterator[Batch] = iter(())

    def step(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        self._replayed = iter(trainer.next_batches("replay") if self._has_past else ())
        super().step(trainer, batches)

    def losses(self, model: Callable, batch: Batch) -> dict[str, torch.Tensor]:
        terms = super().losses(model, batch)
        replayed = next(self._replayed, None)
        if replayed is None:
            return terms
        return terms | {"replay": self.options.weight * self.backbone.loss(model, replayed)}

    def merged(self, index: int) -> list[int]:
        return []  # the adapter itself holds what was learnt

    def deployed(self, count: int) -> list[int]:
        return super().deployed(count)[-1:]
