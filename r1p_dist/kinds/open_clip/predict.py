"""Predictions of a CLIP: probabilities of classes; see r1p_dist.predict.part."""

from functools import cached_property

import torch

from r1p_dist.backbones import ClipBackbone
from r1p_dist.backbones.backbone import Batch
from r1p_dist.config import EvaluationConfig
from r1p_dist.kinds.open_clip.evaluation import class_weights
from r1p_dist.predict.request import Classes


def predictor(config: EvaluationConfig, backbone: ClipBackbone, request: Classes) -> "ClassPredictor":
    return ClassPredictor(config, backbone, request)


class ClassPredictor:
    """The softmax over all classes of a request, of cosine similarities times the model's own scale."""

    def __init__(self, config: EvaluationConfig, backbone: ClipBackbone, request: Classes):
        self._config, self._backbone, self._tasks = config, backbone, request.tasks

    @cached_property
    def _weights(self) -> torch.Tensor:
        """Of all classes, (classes, d)."""
        backbone, batch_size = self._backbone, self._config.batch_size
        return torch.cat([class_weights(backbone, backbone, task, batch_size) for task in self._tasks])

    def __call__(self, batch: Batch) -> list[list[float]]:
        features, _ = self._backbone(image=batch["image"])
        return (self._backbone.logit_scale * features @ self._weights.T).softmax(1).tolist()
