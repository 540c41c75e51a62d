"""Zero-shot classification of whole tasks, shared among the ranks; every picture is counted exactly once."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from r1p_dist.backbones import ClipBackbone
from r1p_dist.config import EvaluationConfig
from r1p_dist.data import EvaluationLoader, Task
from r1p_dist.distributed import sum_over_ranks
from r1p_dist.errors import InputError
from r1p_dist.evaluation.evaluator import Evaluator
from r1p_dist.evaluation.results import TaskResult, confusions_of


def make(
    config: EvaluationConfig,
    backbone: ClipBackbone,
    loaders: Mapping[str, EvaluationLoader],
    before_task: Callable[[], None],
    on_batch: Callable[[], None],
) -> Evaluator:
    return Classifier(backbone, loaders, config.batch_size, before_task, on_batch)


class Classifier(Evaluator):
    """Evaluates a CLIP model: a picture's class is the one whose weight is nearest, as in DAC's code.

    text_batch_size: prompts in one forward; the rest as in `Evaluator`.
    """

    backbone: ClipBackbone

    def __init__(
        self,
        backbone: ClipBackbone,
        loaders: Mapping[str, EvaluationLoader],
        text_batch_size: int,
        before_task: Callable[[], None] = lambda: None,
        on_batch: Callable[[], None] = lambda: None,
    ):
        super().__init__(backbone, loaders, before_task, on_batch)
        self.text_batch_size = text_batch_size

    def evaluate_task(self, model: Callable, task: Task, loader: EvaluationLoader) -> TaskResult:
        weights = class_weights(self.backbone, model, task, self.text_batch_size)
        # 0: not seen, else 1 + the prediction. Every picture is on one rank, so the sum over ranks has them all.
        found = torch.zeros(len(loader.dataset), dtype=torch.int32, device=weights.device)
        for batch in loader:
            batch = {name: tensor.to(weights.device) for name, tensor in batch.items()}
            features, _ = model(image=batch["image"])
            found[batch["position"]] = 1 + (features @ weights.T).argmax(1).int()
            self.on_batch()
        predicted = sum_over_ranks(found).cpu().long() - 1
        is_seen, labels = predicted >= 0, torch.tensor(loader.dataset.labels)
        if not is_seen.any():
            raise InputError(f"task {task.name}: not one of its {len(found)} pictures to be evaluated can be decoded")
        right = 100.0 * (predicted == labels)[is_seen].double()
        left_out = len(found) - len(right)
        return TaskResult(task.name, right, left_out, confusions=confusions_of(labels, predicted))


def class_weights(backbone: ClipBackbone, model: Callable, task: Task, batch_size: int) -> torch.Tensor:
    """Returns the weight of each class, (classes, d): the mean of its templates' unit-norm features, with norm 1 again.

    model: the backbone, or the engine around it. batch_size: prompts in one forward.
    """
    prompts = [prompt for label in range(len(task.class_names)) for prompt in task.prompts(label)]
    features = torch.cat([model(tokens=chunk)[1] for chunk in backbone.tokenize(prompts).split(batch_size)])
    return F.normalize(features.view(len(task.class_names), len(task.templates), -1).mean(1), dim=-1)
