"""Evaluation of instruction tasks: answers are generated, shared among the ranks, and scored together."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from r1p_dist.backbones import LlavaBackbone
from r1p_dist.config import EvaluationConfig
from r1p_dist.data import EvaluationLoader, Task
from r1p_dist.distributed import gather_bytes
from r1p_dist.errors import InputError
from r1p_dist.evaluation.answers import Answer, follows_instruction, score
from r1p_dist.evaluation.evaluator import Evaluator
from r1p_dist.evaluation.results import TaskResult


def make(
    config: EvaluationConfig,
    backbone: LlavaBackbone,
    loaders: Mapping[str, EvaluationLoader],
    before_task: Callable[[], None],
    on_batch: Callable[[], None],
) -> Evaluator:
    return Answerer(backbone, loaders, before_task, on_batch)


class Answerer(Evaluator):
    """Lets a LLaVA-style model answer, greedily and in batches, and scores the answers by the tasks' metrics."""

    backbone: LlavaBackbone

    def evaluate_task(self, model: Callable, task: Task, loader: EvaluationLoader) -> TaskResult:
        found: list[tuple[int, dict[str, Any]]] = []
        for batch in loader:
            references = batch.pop("references")
            batch = {name: tensor.to(self.backbone.device) for name, tensor in batch.items()}
            # a batch of no sample holds a blank one: every rank generates
            answers = self.backbone.answer(model, batch, task.max_new_tokens)
            for position, (text, is_finished), (accepted, choices) in zip(
                batch["position"].tolist(), answers, references, strict=False
            ):
                found.append(
                    (position, {"text": text, "references": accepted, "choices": choices, "is_finished": is_finished})
                )
            self.on_batch()
        everyone = [entry for part in gather_bytes(json.dumps(found).encode()) for entry in json.loads(part)]
        if not everyone:
            raise InputError(f"task {task.name}: not one of its {len(loader.dataset)} samples can be evaluated")
        answers = [
            Answer(fields["text"], tuple(fields["references"]), tuple(fields["choices"]), fields["is_finished"])
            for _, fields in sorted(everyone, key=lambda entry: entry[0])
        ]
        follows = [follows_instruction(answer, task.format) for answer in answers]
        try:
            scores = score(task.metric, answers)
        except ValueError as error:  # the shards do not have what the metric needs
            raise InputError(
                f"task {task.name}: metric {task.metric}: {error}; mend the shards or name another metric"
            ) from error
        return TaskResult(
            task.name,
            torch.tensor(scores, dtype=torch.float64),
            len(loader.dataset) - len(answers),
            100 * sum(follows) / len(follows),
            tuple(answer.text for answer in answers),
        )
