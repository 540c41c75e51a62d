"""The score matrix of a metrics.json: a row per moment of the stream, a column per task."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1p_dist.evaluation.answers import SCALE

Row = list[float | None]


@dataclass(frozen=True)
class ScoreMatrix:
    """Rows of a metrics.json, each as long as there are tasks; None where not evaluated.

    task_metrics: the metric of each task, `accuracy` for classification.
    """

    tasks: list[str]
    task_metrics: list[str]
    zero_shot: Row
    trained: list[Row]
    is_joint: bool

    @classmethod
    def read(cls, metrics: dict[str, Any], key: str = "accuracy") -> "ScoreMatrix":
        """Return the rows under `key`: `accuracy`, the scores by each task's metric, or `instruction_following`."""
        tasks = [str(name) for name in metrics["tasks"]]
        task_metrics = [str(name or "accuracy") for name in pad_row(metrics.get("metric"), len(tasks))]
        rows = [pad_row(row, len(tasks)) for row in metrics[key]] or [pad_row(None, len(tasks))]
        while len(rows) > 1 and all(value is None for value in rows[-1]):
            rows.pop()
        # After the first of several tasks `last` is not defined yet; after training all at once it is.
        is_joint = len(rows) == 2 and len(tasks) > 1 and metrics.get("last") is not None
        return cls(tasks, task_metrics, rows[0], rows[1:], is_joint)

    @property
    def quantity(self) -> str:
        """What the values of all tasks are: accuracy, or else scores."""
        return "accuracy" if {*self.task_metrics} <= {"accuracy"} else "score"

    @property
    def scales(self) -> list[str]:
        """The metric of each task with the scale of its values: `accuracy, percent`."""
        return [f"{metric}, {SCALE.get(metric, 'percent')}" for metric in self.task_metrics]

    @property
    def unit(self) -> str:
        """The unit of means over all tasks: percent, or points where a task has another scale."""
        return "percent" if {SCALE.get(metric, "percent") for metric in self.task_metrics} <= {"percent"} else "points"

    @property
    def own(self) -> Row:
        """The value of each task right after its own training and merge."""
        if self.is_joint:
            return self.trained[0]
        return [self.trained[i][i] if i < len(self.trained) else None for i in range(len(self.tasks))]

    @property
    def now(self) -> Row:
        """The last row there is, None throughout when nothing has been trained."""
        return self.trained[-1] if self.trained else [None] * len(self.tasks)

    @property
    def moments(self) -> list[str]:
        """The names of the rows: zero-shot, then what was trained last."""
        after = ["after all, together"] if self.is_joint else [f"after {name}" for name in self.tasks]
        return ["zero-shot", *after][: 1 + len(self.trained)]

    def is_own(self, row: int, column: int) -> bool:
        """Whether a cell is a task right after its own training; row 0 is zero-shot."""
        return row > 0 and (column == row - 1 or self.is_joint)


def pad_row(row: Sequence[Any] | None, tasks: int) -> list[Any]:
    """Return the row with exactly one value per task, None where there is none."""
    values = list(row or [])[:tasks]
    return values + [None] * (tasks - len(values))


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean, None when there are no values or one is missing."""
    known = list(values)
    return None if not known or any(value is None for value in known) else math.fsum(known) / len(known)


def means_of(metrics: Mapping[str, Any]) -> list[float]:
    """Return the mean score over all tasks, before and after each, of a metrics.json; rows with gaps are left out."""
    return [mean for row in metrics.get("accuracy", []) if (mean := mean_of(row or [])) is not None]


def change_from(reference: float | None, value: float | None) -> float | None:
    """Return value - reference, None when one is missing."""
    return None if value is None or reference is None else value - reference
