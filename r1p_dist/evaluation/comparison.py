"""Runs of several methods and seeds set against each other: their figures and the tables of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from r1p_dist.evaluation.score_matrix import mean_of, pad_row

# Labels that others are measured against: differences, step times, shares, and where the share begins.
REFERENCE, PLAIN, JOINT, ZERO_SHOT = "dac", "lora", "joint", "zero_shot"
MAJORITY = "majority answer"
FOLLOWING = "Answers in the form asked for"
COLUMNS = {
    "transfer": "Transfer",
    "average": "Average",
    "last": "Last",
    "last_seen": "Last, seen domains",
    "last_unseen": "Last, unseen domains",
    "recovered": "Recovered share",
    "before_merge": "Own task before its merge",
    "mft": "Own task after training",
    "bwt": "Backward transfer",
    "forgetting": "Forgetting",
}
OVERALL = ("transfer", "average", "last", "last_seen", "last_unseen", "recovered")
LEARNT = ("before_merge", "mft", "bwt", "forgetting")
PAIRED = ("transfer", "average", "last")

Figures = dict[str, float | None]
Key = tuple[str, int]  # label and seed of a run


@dataclass(frozen=True)
class Result:
    """What a finished run left."""

    folder: Path
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Texts in rows under a header; all columns but the first are numbers, or none is."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    has_numbers: bool = True

    def markdown(self) -> str:
        rule = ["---", *("---:" if self.has_numbers else "---" for _ in self.header[1:])]
        return "".join("| " + " | ".join(row) + " |\n" for row in [self.header, rule, *self.rows])


def figures_by_run(results: dict[Key, Result]) -> dict[Key, Figures]:
    """Return (label, seed) -> the figures of COLUMNS; None where not defined.

    recovered is (Last - zero-shot) / (joint Last - zero-shot), with joint training of the same seed.
    """
    figures = {key: _figures(result.metrics) for key, result in results.items()}
    for (label, seed), own in figures.items():
        best = figures.get((JOINT, seed), {}).get("last")
        accuracy = results[label, seed].metrics["accuracy"]
        zero_shot = None if accuracy[0] is None or None in accuracy[0] else fmean(accuracy[0])
        if None not in (own["last"], best, zero_shot) and best != zero_shot:
            own["recovered"] = (own["last"] - zero_shot) / (best - zero_shot)
    return figures


def _figures(metrics: dict[str, Any]) -> Figures:
    before = metrics.get("before_merge") or [None]
    return {
        **{name: metrics.get(name) for name in COLUMNS},
        **_last_by_domain(metrics["accuracy"][-1], metrics.get("domains") or []),
        # beside the accuracy after its merge, which training all tasks at once does not have
        "before_merge": None if None in before or metrics.get("mft") is None else fmean(before),
    }


def _last_by_domain(last_row: Sequence[float], domains: Sequence[str | None]) -> Figures:
    values = {
        domain: [value for value, name in zip(last_row, domains, strict=False) if name == domain]
        for domain in ("seen", "unseen")
    }
    return {f"last_{domain}": fmean(known) if known else None for domain, known in values.items()}


def majority_figures(values: Sequence[float], domains: Sequence[str | None]) -> Figures:
    """Return the figures of the majority answers: Last alone is defined, since no task comes before another.

    values: of each task, in the order of `domains`.
    """
    return {**dict.fromkeys(COLUMNS), "last": fmean(values), **_last_by_domain(values, domains)}


def overall_table(
    labels: Sequence[str],
    figures: dict[Key, Figures],
    ranks: Mapping[str, Sequence[int]],
    majority: Figures | None = None,
) -> Table:
    """Return the table method x OVERALL, rank by Last, number of seeds; mean ± sample standard deviation over seeds.

    ranks: label -> rank, and the ends of its interval. majority: a first row without seeds.
    """
    rows = [[MAJORITY, *_cells([majority], OVERALL), "–", "–"]] if majority else []
    for label in labels:
        own = runs_of(label, figures)
        rank = "{} ({}–{})".format(*ranks[label]) if label in ranks else "–"
        rows.append([label, *_cells(own, OVERALL), rank, str(len(own))])
    return Table(["Method", *(COLUMNS[name] for name in OVERALL), "Rank by Last", "Seeds"], rows)


def learnt_table(labels: Sequence[str], figures: dict[Key, Figures]) -> Table:
    """Return the table method x LEARNT, mean ± sample standard deviation over seeds."""
    rows = [[label, *_cells(runs_of(label, figures), LEARNT)] for label in labels]
    return Table(["Method", *(COLUMNS[name] for name in LEARNT)], rows)


def runs_of(label: str, figures: Mapping[Key, Figures]) -> list[Figures]:
    """Return the figures of a label's runs, by seed."""
    return [figures[key] for key in sorted(figures) if key[0] == label]


def _cells(runs: Sequence[Figures], names: Sequence[str]) -> list[str]:
    return [cell([values[name] for values in runs], digits=2 if name == "recovered" else 1) for name in names]


def last_by_task(results: dict[Key, Result]) -> dict[Key, dict[str, float | None]]:
    """Return (label, seed) -> task -> its value at the end of the stream, in the scale of the task's metric."""
    return {
        key: dict(zip(result.metrics["tasks"], result.metrics["accuracy"][-1], strict=True))
        for key, result in results.items()
    }


def following_by_task(results: dict[Key, Result]) -> dict[Key, dict[str, float | None]]:
    """Return (label, seed) -> task -> percent of its answers at the end of the stream that have the form asked for.

    None where a run does not say.
    """
    found = {}
    for key, result in results.items():
        tasks, rows = result.metrics["tasks"], result.metrics.get("instruction_following") or [None]
        found[key] = dict(zip(tasks, pad_row(rows[-1], len(tasks)), strict=True))
    return found


def tasks_table(
    labels: Sequence[str],
    metric_of_task: Mapping[str, str],
    values: dict[Key, dict[str, float | None]],
    following: dict[Key, dict[str, float | None]],
    majority: Mapping[str, float],
) -> Table:
    """Return the table method x task at the end of the stream, mean ± sample standard deviation over seeds.

    values: of `last_by_task`. following: of `following_by_task`, the last column is its mean over tasks.
    majority: task -> value, a first row; empty where there is none.
    """
    rows = [[MAJORITY, *(cell([majority[task]]) for task in metric_of_task), "–"]] if majority else []
    for label in labels:
        in_form = [mean_of(of_task.values()) for of_task in runs_of(label, following)]
        rows.append([label, *_task_cells(runs_of(label, values), metric_of_task), cell(in_form)])
    tasks = [f"{task} ({metric})" for task, metric in metric_of_task.items()]
    return Table(["Method", *tasks, FOLLOWING], rows)


def following_table(
    labels: Sequence[str], tasks: Iterable[str], following: dict[Key, dict[str, float | None]]
) -> Table:
    """Return the table method x task of `following_by_task`, mean ± sample standard deviation over seeds."""
    tasks = list(tasks)
    return Table(["Method", *tasks], [[label, *_task_cells(runs_of(label, following), tasks)] for label in labels])


def _task_cells(runs: Sequence[Mapping[str, float | None]], tasks: Iterable[str]) -> list[str]:
    return [cell([of_task.get(task) for of_task in runs]) for task in tasks]


def cell(values: Sequence[float | None], digits: int = 1, is_signed: bool = False) -> str:
    """Return `mean ± sample standard deviation` of the values there are, the mean alone for one, a dash for none."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    # Adding 0.0 turns the -0.0 that rounding leaves into 0.0.
    mean = f"{round(fmean(known), digits) + 0.0:{'+' if is_signed else ''}.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {stdev(known):.{digits}f}"
