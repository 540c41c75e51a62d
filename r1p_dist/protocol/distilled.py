"""What methods share that hold a fully fine-tuned CLIP to a teacher's similarities of pictures and prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from r1p_dist.config import NotNegative, Positive, RunConfig, Section
from r1p_dist.kinds import kind_of
from r1p_dist.losses import distillation_loss
from r1p_dist.protocol.full import FullMethod
from r1p_dist.protocol.method import Stage
from r1p_dist.protocol.trainer import Trainer

if TYPE_CHECKING:
    from r1p_dist.backbones.backbone import Batch


class DistilledOptions(Section):
    """Options of a distillation."""

    weight: NotNegative = 1.0
    """Of both distillation terms."""
    temperature: Positive = 2.0
    """That softens the similarities of teacher and model."""


class DistilledMethod(FullMethod):
    """Full fine-tuning with a teacher, whose numbers lie in the column `teacher`; `begin` is to fill it.

    The model takes the teacher's numbers for a forward in each micro batch, so no second model is there: that costs a
    sum of all weights over the ranks twice, and the column four bytes per weight, sharded as moments are.
    """

    columns = ("teacher",)
    Options = DistilledOptions
    options: DistilledOptions

    @classmethod
    def check(cls, options: DistilledOptions, config: RunConfig) -> None:
        if kind_of(config.backbone.kind).has_answers:
            raise ValueError(
                f"method={config.method} compares pictures with prompts, which backbone.kind={config.backbone.kind} "
                "does not; use a CLIP"
            )

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        self._trainer = trainer

    def reference(self, batch: Batch) -> Batch:
        """Returns the pictures and prompts that model and teacher are compared on: those of the batch itself."""
        return batch

    def losses(self, model: Callable, batch: Batch) -> dict[str, torch.Tensor]:
        backbone, options, reference = self.backbone, self.options, self.reference(batch)
        with self._trainer.weights("teacher"), torch.no_grad():
            teacher_image, teacher_text = backbone.outputs(backbone, reference)
        terms = super().losses(model, batch)
        image, _ = backbone.outputs(model, reference)
        # a row for each sample, so that all ranks have as many
        text, scale = teacher_text[reference["place"]], backbone.logit_scale
        distilled = distillation_loss(image, teacher_image, text, scale, options.temperature)
        return terms | {"distilled": options.weight * distilled}
