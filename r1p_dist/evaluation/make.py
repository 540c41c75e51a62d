"""Which evaluation a backbone's tasks get; what the other kind needs is not imported."""

from collections.abc import Callable, Mapping

from r1p_dist.backbones import Backbone
from r1p_dist.config import EvaluationConfig
from r1p_dist.data import EvaluationLoader
from r1p_dist.evaluation.evaluator import Evaluator


def make_evaluator(
    config: EvaluationConfig,
    backbone: Backbone,
    loaders: Mapping[str, EvaluationLoader],
    before_task: Callable[[], None] = lambda: None,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluator:
    """Returns the evaluator of a backbone's streams; loaders, before_task and on_batch as in `Evaluator`."""
    if backbone.kind == "llava":
        from r1p_dist.evaluation.answering import Answerer

        return Answerer(backbone, loaders, before_task, on_batch)
    from r1p_dist.evaluation.classify import Classifier

    return Classifier(backbone, loaders, config.batch_size, before_task, on_batch)
