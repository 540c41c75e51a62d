"""What an evaluation of one task found, by classification or by answers."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TaskResult:
    """scores: one per sample in the order of the shards, in percent (100 or 0 where it is right or wrong).

    Samples that cannot be read have no score; `left_out` is their number. following: the share of answers, in percent,
    that keep to the instruction's form; None for classification. answers: the texts, of conversations alone.
    """

    task: str
    scores: torch.Tensor  # (samples,) float64
    left_out: int = 0
    following: float | None = None
    answers: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """The task's figure: the mean score."""
        return self.scores.mean().item()
