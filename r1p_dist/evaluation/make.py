"""Which evaluation a backbone's tasks get; what other kinds need is not imported."""

from collections.abc import Callable, Mapping
from typing import Protocol

from r1p_dist.backbones import Backbone
from r1p_dist.config import EvaluationConfig
from r1p_dist.data import EvaluationLoader
from r1p_dist.evaluation.evaluator import Evaluator
from r1p_dist.kinds import kind_of


class EvaluationPart(Protocol):
    """What the part `evaluation` of a kind of backbone holds."""

    def make(
        self,
        config: EvaluationConfig,
        backbone: Backbone,
        loaders: Mapping[str, EvaluationLoader],
        before_task: Callable[[], None],
        on_batch: Callable[[], None],
    ) -> Evaluator:
        """As `make_evaluator`."""


def make_evaluator(
    config: EvaluationConfig,
    backbone: Backbone,
    loaders: Mapping[str, EvaluationLoader],
    before_task: Callable[[], None] = lambda: None,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluator:
    """Returns the evaluator of a backbone's streams; loaders, before_task and on_batch as in `Evaluator`."""
    part: EvaluationPart = kind_of(backbone.kind).part("evaluation")
    return part.make(config, backbone, loaders, before_task, on_batch)
