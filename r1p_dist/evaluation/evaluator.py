"""What every evaluation shares: whole tasks, one after another, each with its loader."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from r1p_dist.backbones import Backbone
from r1p_dist.data import EvaluationLoader, Task
from r1p_dist.evaluation.results import TaskResult


class Evaluator:
    """Evaluates whole tasks, shared among the ranks; every sample is counted exactly once.

    loaders: one per task name; they have the same number of batches on every rank, because ZeRO-3 gathers weights in
    each forward. before_task and on_batch are called before every task and after every batch: a place to look up.
    select: gives a context in which the model is the one for a task, where a method has one for each.
    """

    def __init__(
        self,
        backbone: Backbone,
        loaders: Mapping[str, EvaluationLoader],
        before_task: Callable[[], None] = lambda: None,
        on_batch: Callable[[], None] = lambda: None,
    ):
        self.backbone, self.loaders = backbone, loaders
        self.before_task, self.on_batch = before_task, on_batch
        self.select: Callable[[Task], AbstractContextManager] = nullcontext

    @torch.no_grad()
    def evaluate(
        self,
        model: Callable,
        tasks: Sequence[Task],
        watch: Callable[[Task], AbstractContextManager] = nullcontext,
    ) -> list[TaskResult]:
        """Returns one result per task, the same on every rank. model: the backbone, or the engine around it.

        watch: gives a context in which a task is evaluated, for who measures something in its forward passes.
        """
        self.backbone.eval()
        results = []
        for task in tasks:
            self.before_task()
            with self.select(task), watch(task):
                results.append(self.evaluate_task(model, task, self.loaders[task.name]))
        self.backbone.train()
        return results

    def evaluate_task(self, model: Callable, task: Task, loader: EvaluationLoader) -> TaskResult:
        """Returns the result of one task. InputError: no sample of it can be evaluated."""
        raise NotImplementedError
