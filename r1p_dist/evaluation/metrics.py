"""Continual-learning figures from an accuracy matrix.

a_{t,i} is the accuracy (percent) on task i after training task t; t and i run from 1 to T, row 0 is zero-shot.
"""

from collections.abc import Callable, Sequence
from statistics import fmean

Matrix = Sequence[Sequence[float | None] | None]


class _MissingError(Exception):
    """An entry that a figure needs is not in the matrix."""


def continual_metrics(matrix: Matrix) -> dict[str, float | None]:
    """Return every figure of an accuracy matrix; a figure that needs an entry which is not there is None.

    matrix: row 0 is zero-shot, then one row of T percentages per trained task. Rows and entries not reached are None
    or, at the end, left out. One trained row for several tasks, with nothing after it, is joint training: only last
    and mfn are defined, its mean. So after the first of several tasks the rows to come have to be there as None.

    Keys, nothing is rounded:
      transfer    mean over i = 2..T of mean over t = 1..i-1 of a_{t,i} (ZSCL; None for T = 1)
      average     mean over all t and i of a_{t,i}, without row 0 (ZSCL)
      last        mean over i of a_{T,i} (ZSCL)
      bwt         1/(T-1) * sum over i < T of (a_{T,i} - a_{i,i}), backward transfer (Lopez-Paz; None for T = 1)
      bwt_coin    1/T * sum over i <= T of (a_{T,i} - a_{i,i}) = mfn - mft (CoIN)
      forgetting  1/(T-1) * sum over i < T of max over t = i..T-1 of (a_{t,i} - a_{T,i}) (None for T = 1)
      mft         mean over i of a_{i,i}: each task right after its own training
      mfn         the same number as last
      maa         mean over t of mean over i <= t of a_{t,i}

    Raises ValueError for rows of different lengths or more than T trained rows.
    """
    tasks = _number_of_tasks(matrix)
    trained = range(1, tasks + 1)
    is_joint = tasks > 1 and len(matrix) == 2
    final = 1 if is_joint else tasks

    def a(row: int, task: int) -> float:
        values = matrix[row] if row < len(matrix) else None
        value = None if values is None else values[task - 1]
        if value is None:
            raise _MissingError
        return float(value)

    def last() -> float:
        return fmean(a(final, i) for i in trained)

    figures: dict[str, Callable[[], float]] = {
        "transfer": lambda: fmean(fmean(a(t, i) for t in range(1, i)) for i in trained[1:]),
        "average": lambda: fmean(a(t, i) for t in trained for i in trained),
        "last": last,
        "bwt": lambda: fmean(a(tasks, i) - a(i, i) for i in trained[:-1]),
        "bwt_coin": lambda: fmean(a(tasks, i) - a(i, i) for i in trained),
        "forgetting": lambda: fmean(max(a(t, i) for t in range(i, tasks)) - a(tasks, i) for i in trained[:-1]),
        "mft": lambda: fmean(a(i, i) for i in trained),
        "mfn": last,
        "maa": lambda: fmean(fmean(a(t, i) for i in range(1, t + 1)) for t in trained),
    }
    undefined = set()
    if tasks < 2:
        undefined = {"transfer", "bwt", "forgetting"} if tasks else set(figures)
    elif is_joint:
        undefined = set(figures) - {"last", "mfn"}
    return {name: None if name in undefined else _value_or_none(figure) for name, figure in figures.items()}


def _number_of_tasks(matrix: Matrix) -> int:
    lengths = {len(row) for row in matrix if row is not None}
    if len(lengths) > 1:
        raise ValueError(f"accuracy matrix: rows have different lengths {sorted(lengths)}; every row has one per task")
    tasks = lengths.pop() if lengths else 0
    if tasks and len(matrix) > tasks + 1:
        raise ValueError(
            f"accuracy matrix: {len(matrix)} rows for {tasks} tasks; there is one zero-shot row and one row per task"
        )
    return tasks


def _value_or_none(figure: Callable[[], float]) -> float | None:
    try:
        return figure()
    except _MissingError:
        return None
