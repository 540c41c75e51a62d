"""What an evaluation of one task found, by classification or by answers."""

from dataclasses import dataclass

import torch

CONFUSIONS = 20  # of a task that are kept: as many for a thousand classes as for ten


@dataclass(frozen=True)
class TaskResult:
    """scores: one per sample in the order of the shards, in percent (100 or 0 where it is right or wrong).

    Samples that cannot be read have no score; `left_out` is their number. following: the share of answers, in percent,
    that keep to the instruction's form; None for classification. answers: the texts, of conversations alone.
    confusions: the most frequent wrong predictions of a classification, as (class, prediction, how many samples, the
    first one's place in the shards).
    """

    task: str
    scores: torch.Tensor  # (samples,) float64
    left_out: int = 0
    following: float | None = None
    answers: tuple[str, ...] = ()
    confusions: tuple[tuple[int, int, int, int], ...] = ()

    @property
    def score(self) -> float:
        """The task's figure: the mean score."""
        return self.scores.mean().item()


def confusions_of(labels: torch.Tensor, predicted: torch.Tensor) -> tuple[tuple[int, int, int, int], ...]:
    """Returns `TaskResult.confusions`, at most CONFUSIONS of them, the most frequent first.

    labels, predicted: (samples,) int64; a prediction below 0 is none.
    """
    wrong = ((predicted >= 0) & (predicted != labels)).nonzero().flatten()
    pairs = torch.stack([labels[wrong], predicted[wrong]])
    pairs, which, counts = pairs.unique(dim=1, return_inverse=True, return_counts=True)
    first = torch.full_like(counts, len(labels)).scatter_reduce(0, which, wrong, "amin")
    order = counts.argsort(descending=True, stable=True)[:CONFUSIONS]
    return tuple(map(tuple, torch.cat([pairs, counts[None], first[None]])[:, order].T.tolist()))
