"""Which evaluation a backbone's tasks get."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from r1p_dist.backbones import Backbone, LlavaBackbone
from r1p_dist.config import EvaluationConfig
from r1p_dist.data import EvaluationLoader, Task
from r1p_dist.evaluation.answering import Answerer
from r1p_dist.evaluation.classify import Classifier
from r1p_dist.evaluation.results import TaskResult


class Evaluator(Protocol):
    """Evaluates whole tasks, shared among the ranks; every sample is counted exactly once."""

    def evaluate(self, model: Callable, tasks: Sequence[Task]) -> list[TaskResult]:
        """Returns one result per task, the same on every rank. model: the backbone, or the engine around it."""


def make_evaluator(
    config: EvaluationConfig,
    backbone: Backbone,
    loaders: Mapping[str, EvaluationLoader],
    before_task: Callable[[], None] = lambda: None,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluator:
    """Returns the evaluator of a backbone's streams; before_task and on_batch are called before every task and after
    every batch: places to look up."""
    if isinstance(backbone, LlavaBackbone):
        return Answerer(backbone, loaders, before_task, on_batch)
    return Classifier(backbone, loaders, config.batch_size, before_task, on_batch)
