"""What predictions need to know of a kind of backbone."""

from collections.abc import Callable
from typing import Protocol

from r1p_dist.backbones import Backbone
from r1p_dist.backbones.backbone import Batch
from r1p_dist.config import EvaluationConfig
from r1p_dist.predict.request import Request

# of a batch of pictures: the probabilities of a request's classes, or the answer, of each
Predictor = Callable[[Batch], list[list[float]] | list[str]]


class PredictPart(Protocol):
    """What the part `predict` of a kind of backbone holds."""

    def predictor(self, config: EvaluationConfig, backbone: Backbone, request: Request) -> Predictor:
        """Returns what predicts with the weights that the backbone has when it is first called."""
