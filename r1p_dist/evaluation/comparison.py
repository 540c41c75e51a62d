"""Runs of several methods and seeds set against each other: figures, paired differences, Markdown tables."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

REFERENCE, JOINT, ZERO_SHOT = "dac", "joint", "zero_shot"
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
Correct = dict[str, np.ndarray]  # task -> (pictures,), 1.0 where the answer was right


@dataclass(frozen=True)
class Result:
    """What a finished run left."""

    folder: Path
    metrics: dict[str, Any]


class NoIntervalError(Exception):
    """Why there are no per-picture results to draw from."""


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
    last_row, domains = metrics["accuracy"][-1], metrics.get("domains") or []
    wall_seconds = metrics.get("wall_seconds")

    def last_of(domain: str) -> float | None:
        values = [value for value, name in zip(last_row, domains, strict=False) if name == domain]
        return fmean(values) if values else None

    return {
        **{key: metrics.get(key) for key in ("transfer", "average", "last", "mft", "forgetting")},
        "last_seen": last_of("seen"),
        "last_unseen": last_of("unseen"),
        "recovered": None,
        "minutes": None if wall_seconds is None else wall_seconds / 60,
    }


def figures_table(labels: Sequence[str], figures: dict[tuple[str, int], Figures]) -> str:
    """Return the Markdown table method x COLUMNS, mean ± sample standard deviation over seeds."""
    rows = []
    for label in labels:
        own = [figures[key] for key in sorted(figures) if key[0] == label]
        cells = [cell([values[name] for values in own], digits=2 if name == "recovered" else 1) for name in COLUMNS]
        rows.append([label, *cells, str(len(own))])
    return markdown(["Method", *COLUMNS.values(), "Seeds"], rows)


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
    """Return which test pictures were right in the run's last evaluation, from its correct.jsonl.

    Raises NoIntervalError when the file is missing or does not agree with metrics.json.
    """
    path, metrics = result.folder / "correct.jsonl", result.metrics
    if not path.is_file():
        raise NoIntervalError(f"{path.parent.name} has no correct.jsonl")
    latest: dict[str, tuple[int, str]] = {}
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
    """Return the 95 % bootstrap interval of the difference of Last, in points, pictures drawn anew within each task.

    pairs: both methods' results, per seed. A picture's difference is its mean over the seeds, so the interval is about
    the test pictures; the spread over seeds is apart from it.
    """
    if not pairs:
        raise NoIntervalError("no seed was finished by both")
    generator = np.random.default_rng(0)
    tasks = list(pairs[0][0])
    draws = np.zeros(BOOTSTRAP_DRAWS)
    for task in tasks:
        marks = [side[task] for pair in pairs for side in pair if task in side]
        if len(marks) != 2 * len(pairs) or len({len(mark) for mark in marks}) != 1:
            raise NoIntervalError(f"the runs were not evaluated on the same pictures of {task}")
        difference = np.mean([mine[task] - theirs[task] for mine, theirs in pairs], axis=0)  # (pictures,)
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
    header = ["Other", *(COLUMNS[name] for name in PAIRED), "Last, 95 % over test pictures", "Seeds"]
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
