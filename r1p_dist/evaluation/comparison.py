"""Runs of several methods and seeds set against each other: figures, paired differences, Markdown tables."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from r1p_dist.run_files import CORRECT_FILE

REFERENCE, JOINT, ZERO_SHOT = "dac", "joint", "zero_shot"
MAJORITY = "majority answer"
COLUMNS = {
    "transfer": "Transfer",
    "average": "Average",
    "last": "Last",
    "last_seen": "Last, seen domains",
    "last_unseen": "Last, unseen domains",
    "mft": "Own task after training",
    "forgetting": "Forgetting",
    "recovered": "Recovered share",
    "minutes": "Minutes",
}
PAIRED = ("transfer", "average", "last")
BOOTSTRAP_DRAWS = 10_000

Figures = dict[str, float | None]
# task -> (samples,): 1.0 for the right answer, values between or above where the metric gives them (score / 100)
Correct = dict[str, np.ndarray]


@dataclass(frozen=True)
class Result:
    """What a finished run left."""

    folder: Path
    metrics: dict[str, Any]


class NoIntervalError(Exception):
    """Why there are no per-sample results to draw from."""


def figures_by_run(results: dict[tuple[str, int], Result]) -> dict[tuple[str, int], Figures]:
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
    wall_seconds = metrics.get("wall_seconds")
    return {
        **dict.fromkeys(COLUMNS),
        **{key: metrics.get(key) for key in ("transfer", "average", "last", "mft", "forgetting")},
        **_last_by_domain(metrics["accuracy"][-1], metrics.get("domains") or []),
        "minutes": None if wall_seconds is None else wall_seconds / 60,
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


def figures_table(
    labels: Sequence[str], figures: dict[tuple[str, int], Figures], majority: Figures | None = None
) -> str:
    """Return the Markdown table method x COLUMNS, mean ± sample standard deviation over seeds.

    majority: a first row without seeds.
    """

    def cells(own: Sequence[Figures]) -> list[str]:
        return [cell([values[name] for values in own], digits=2 if name == "recovered" else 1) for name in COLUMNS]

    rows = [[MAJORITY, *cells([majority]), "–"]] if majority else []
    for label in labels:
        own = [figures[key] for key in sorted(figures) if key[0] == label]
        rows.append([label, *cells(own), str(len(own))])
    return markdown(["Method", *COLUMNS.values(), "Seeds"], rows)


def last_by_task(results: dict[tuple[str, int], Result]) -> dict[tuple[str, int], dict[str, float | None]]:
    """Return (label, seed) -> task -> its value at the end of the stream, in the scale of the task's metric."""
    return {
        key: dict(zip(result.metrics["tasks"], result.metrics["accuracy"][-1], strict=True))
        for key, result in results.items()
    }


def tasks_table(
    labels: Sequence[str],
    metric_of_task: Mapping[str, str],
    values: dict[tuple[str, int], dict[str, float | None]],
    majority: Mapping[str, float],
) -> str:
    """Return the Markdown table method x task at the end of the stream, mean ± sample standard deviation over seeds.

    values: of `last_by_task`. majority: task -> value, a first row; empty where there is none.
    """
    rows = [[MAJORITY, *(cell([majority[task]]) for task in metric_of_task)]] if majority else []
    for label in labels:
        own = [values[key] for key in sorted(values) if key[0] == label]
        rows.append([label, *(cell([of_task.get(task) for of_task in own]) for task in metric_of_task)])
    return markdown(["Method", *(f"{task} ({metric})" for task, metric in metric_of_task.items())], rows)


def paired_differences(
    other: str, results: dict[tuple[str, int], Result], figures: dict[tuple[str, int], Figures]
) -> dict[str, Any]:
    """Return the differences REFERENCE - other of each figure in PAIRED, one per seed that both have.

    Zero-shot has one run, which counts for every seed. `interval` is that of `last_interval`, or `no_interval` says
    why there is none.
    """
    zero_shot = next((key for key in figures if key[0] == ZERO_SHOT), None)
    pairs = []
    for key in sorted(figures):
        partner = zero_shot if other == ZERO_SHOT else (other, key[1])
        if key[0] == REFERENCE and partner in figures:
            pairs.append((key, partner))
    differences: dict[str, Any] = {"seeds": [seed for (_, seed), _ in pairs]}
    for name in PAIRED:
        values = [(figures[mine][name], figures[theirs][name]) for mine, theirs in pairs]
        differences[name] = [mine - theirs for mine, theirs in values if None not in (mine, theirs)]
    try:
        differences["interval"] = last_interval(
            [(read_correct(results[mine]), read_correct(results[theirs])) for mine, theirs in pairs]
        )
    except NoIntervalError as reason:
        differences["no_interval"] = str(reason)
    return differences


def read_correct(result: Result) -> Correct:
    """Return how right each test sample was in the run's last evaluation, from its correct.jsonl.

    A line has a digit per sample, or a list of score / 100 where the metric is graded. Raises NoIntervalError when the
    file is missing or does not agree with metrics.json.
    """
    path, metrics = result.folder / CORRECT_FILE, result.metrics
    if not path.is_file():
        raise NoIntervalError(f"{path.parent.name} has no correct.jsonl")
    latest: dict[str, tuple[int, str | list[float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["row"] >= latest.get(record["task"], (0, ""))[0]:
            latest[record["task"]] = (record["row"], record["correct"])
    correct = {task: np.array([float(mark) for mark in marks]) for task, (_, marks) in latest.items()}
    for task, accuracy in zip(metrics["tasks"], metrics["accuracy"][-1], strict=True):
        if task not in correct or abs(100 * correct[task].mean() - accuracy) > 0.01:
            raise NoIntervalError(f"correct.jsonl of {path.parent.name} does not agree with its metrics.json on {task}")
    return {task: correct[task] for task in metrics["tasks"]}


def last_interval(pairs: Sequence[tuple[Correct, Correct]]) -> list[float]:
    """Return the 95 % bootstrap interval of the difference of Last, in points, samples drawn anew within each task.

    pairs: both methods' results, per seed. A sample's difference is its mean over the seeds, so the interval is about
    the test samples; the spread over seeds is apart from it.
    """
    if not pairs:
        raise NoIntervalError("no seed was finished by both")
    generator = np.random.default_rng(0)
    tasks = list(pairs[0][0])
    draws = np.zeros(BOOTSTRAP_DRAWS)
    for task in tasks:
        marks = [side[task] for pair in pairs for side in pair if task in side]
        if len(marks) != 2 * len(pairs) or len({len(mark) for mark in marks}) != 1:
            raise NoIntervalError(f"the runs were not evaluated on the same samples of {task}")
        difference = np.mean([mine[task] - theirs[task] for mine, theirs in pairs], axis=0)  # (samples,)
        chosen = generator.integers(len(difference), size=(BOOTSTRAP_DRAWS, len(difference)))
        draws += difference[chosen].mean(axis=1) / len(tasks)
    return [float(100 * bound) for bound in np.percentile(draws, [2.5, 97.5])]


def paired_table(differences: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown table of other method x mean difference ± sample standard deviation over seeds."""
    rows, reasons = [], []
    for label, pair in differences.items():
        interval = "missing"
        if "interval" in pair:
            interval = "{:+.1f} to {:+.1f}".format(*pair["interval"])
        else:
            reasons.append(f"- {label}: no interval, {pair['no_interval']}\n")
        cells = [cell(pair[name], is_signed=True) for name in PAIRED]
        rows.append([label, *cells, interval, str(len(pair["seeds"]))])
    header = ["Other", *(COLUMNS[name] for name in PAIRED), "Last, 95 % over test samples", "Seeds"]
    return markdown(header, rows) + ("\n" + "".join(reasons) if reasons else "")


def cell(values: Sequence[float | None], digits: int = 1, is_signed: bool = False) -> str:
    """Return `mean ± sample standard deviation` of the values there are, the mean alone for one, a dash for none."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    # Adding 0.0 turns the -0.0 that rounding leaves into 0.0.
    mean = f"{round(fmean(known), digits) + 0.0:{'+' if is_signed else ''}.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {stdev(known):.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, all columns but the first to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "".join("| " + " | ".join(row) + " |\n" for row in [header, rule, *rows])
