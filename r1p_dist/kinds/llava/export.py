"""What the export of a model of transformers needs; see r1p_dist.export.part."""

from collections.abc import Callable, Mapping

from r1p_dist.config import BackboneConfig
from r1p_dist.export.finished_run import FinishedRun
from r1p_dist.kinds.llava.frozen_weights import LlavaWeights
from r1p_dist.kinds.llava.hf_folder import HfLlava

WRITERS: Mapping[str, Callable] = {}  # it is a model of transformers alone


def frozen_weights(config: BackboneConfig) -> LlavaWeights:
    return LlavaWeights(config)


def hf_model(run: FinishedRun) -> HfLlava:
    return HfLlava(run)
