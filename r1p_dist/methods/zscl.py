"""ZSCL (arXiv 2303.06628): the pretrained CLIP teaches on reference pictures, and a task's weights are averaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from r1p_dist.adapters.low_rank import full_values
from r1p_dist.config import Count, NotNegative
from r1p_dist.data import Stream
from r1p_dist.distributed import owner, rank
from r1p_dist.protocol import DataRequest, DistilledMethod, DistilledOptions, Stage, Trainer

if TYPE_CHECKING:
    from r1p_dist.backbones.backbone import Batch
    from r1p_dist.data import Task


class Zscl(DistilledMethod):
    """ZSCL: full fine-tuning held to the pretrained model's similarities, with averaged weights (arXiv 2303.06628).

    The loss adds weight * T^2 times the cross entropy of softmax(S' / T) and softmax(S / T), over texts and over
    pictures, S' the pretrained model's similarities, and l2 * ||theta - theta_start||^2. A task leaves the plain mean
    of theta_start and of a snapshot every so many steps, the first after one step.

    The paper's reference pictures are ImageNet's, its texts captions; here they are those of a stream, or where none
    is given the task's own. As in the released code the model's pictures are compared with the teacher's texts, so the
    text tower is held by l2 and the average alone. With l2 every rank has all gradients and the start at once.
    """

    paper = "arXiv 2303.06628"
    stores = "the pretrained weights; in training, their start and their mean"
    columns = ("teacher", "average")
    tiny = {"l2": 0.1, "every": 1}

    class Options(DistilledOptions):
        """Options of ZSCL."""

        reference: str | None = None
        """A stream whose training pictures and prompts are the reference; null: those of the task itself."""
        l2: NotNegative = 1.0
        """Of the squared distance from the task's start; the released script's value."""
        every: Count = 100
        """Steps from one snapshot of the average to the next."""

    options: Options

    def further_data(self, stage: Stage, past: Sequence[Task]) -> dict[str, DataRequest]:
        reference = self.options.reference
        return {} if reference is None else {"reference": DataRequest(Stream.load(reference).tasks)}

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        super().begin(stage, trainer)
        past = trainer.past_memory()
        if past:
            trainer.fill_column("teacher", past[0])
        else:
            trainer.edit_column("teacher", lambda teacher, value: value)
        trainer.edit_column("average", lambda average, value: value)
        self._is_first = not past
        self._start = {}
        if self.options.l2:
            self._start = {name: full_values(value)[0] for name, value in self.trainable_parameters().items()}
        self._references: Iterator[Batch] = iter(())

    def step(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        if self.options.reference is not None:
            self._references = iter(trainer.next_batches("reference"))
        if not self.options.l2:
            super().step(trainer, batches)
            return
        micro = [trainer.gradients(batch) for batch in batches]
        gradients = {}
        for name, value in self.trainable_parameters().items():
            distance = full_values(value)[0] - self._start[name]
            mean = torch.stack([part[name] for part in micro]).mean(0)
            gradients[name] = mean + 2 * self.options.l2 * distance
        trainer.backward_gradients(gradients)
        trainer.update()

    def reference(self, batch: Batch) -> Batch:
        return next(self._references, batch)

    def after_step(self, trainer: Trainer) -> None:
        number, rest = divmod(trainer.step_number, self.options.every)
        if not rest:  # of the start and `number` snapshots before
            trainer.edit_column("average", lambda average, value: average + (value - average) / (number + 2))

    def end(self, stage: Stage, trainer: Trainer) -> None:
        self._memory = {}
        if self._is_first:
            with trainer.weights("teacher"):
                for number, (name, value) in enumerate(self.trainable_parameters().items()):
                    (whole,) = full_values(value)
                    if rank() == owner(number):
                        self._memory[name] = whole.cpu()
        trainer.edit(lambda value, average: average, "average")

    def memory(self) -> dict[str, torch.Tensor]:
        return self._memory
