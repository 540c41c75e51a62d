"""Predictions of a LLaVA: the answer to a question about a picture; see r1p_dist.predict.part."""

from r1p_dist.backbones import LlavaBackbone
from r1p_dist.backbones.backbone import Batch
from r1p_dist.config import EvaluationConfig
from r1p_dist.predict.part import Predictor
from r1p_dist.predict.request import Question


def predictor(config: EvaluationConfig, backbone: LlavaBackbone, request: Question) -> Predictor:
    def answer(batch: Batch) -> list[str]:
        return [text for text, _ in backbone.answer(backbone, batch, request.max_new_tokens)]

    return answer
