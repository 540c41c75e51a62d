"""The pages of a comparison, as Markdown and as data."""

import argparse
from collections.abc import Sequence
from typing import Any

from r1p_dist.compare.runs import Run
from r1p_dist.data.stream import Stream
from r1p_dist.errors import InputError
from r1p_dist.evaluation.answers import SCALE
from r1p_dist.evaluation.comparison import (
    COLUMNS,
    MAJORITY,
    PAIRED,
    REFERENCE,
    Figures,
    Result,
    cell,
    figures_by_run,
    figures_table,
    last_by_task,
    majority_figures,
    markdown,
    paired_differences,
    paired_table,
    tasks_table,
)
from r1p_dist.evaluation.majority import majority_baselines


def comparison(
    arguments: argparse.Namespace,
    labels: Sequence[str],
    stream: Stream,
    split: str,
    results: dict[tuple[str, int], Result],
) -> tuple[str, dict[str, Any]]:
    """Return the Markdown page of all methods, and the same as data."""
    figures = figures_by_run(results)
    majority, tasks_page, tasks_data = None, "", {}
    if stream.tasks[0].is_instruction:
        majority, tasks_page, tasks_data = instruction_tasks(labels, stream, split, results)
    page = figures_table(labels, figures, majority)
    page += (
        f"\nRecipe {arguments.recipe}, world size {arguments.ranks}. {unit_of(stream).capitalize()} on the "
        f"{split} split, mean ± sample standard deviation over the seeds. Recovered share: (Last - zero-shot) / "
        "(joint - zero-shot), per seed.\n"
        f"{tasks_page}"
    )
    differences = {}
    if REFERENCE in labels and len(labels) > 1:
        others = [label for label in labels if label != REFERENCE]
        differences = {label: paired_differences(label, results, figures) for label in others}
        page += f"\n{REFERENCE} minus the other, paired over seeds:\n\n" + paired_table(differences)
    runs = {f"{label}-seed{seed}": values for (label, seed), values in figures.items()}
    return page, {"runs": runs, "paired": differences, **tasks_data}


def instruction_tasks(
    labels: Sequence[str],
    stream: Stream,
    split: str,
    results: dict[tuple[str, int], Result],
) -> tuple[Figures | None, str, dict[str, Any]]:
    """Return the figures of the majority answers, None where they cannot be had, the table of tasks, and its data."""
    try:
        majority, missing = majority_baselines(stream, split), ""
    except InputError as error:
        majority, missing = {}, f"\n- {MAJORITY}: missing, {error}\n"
    scores = {task: value for task, (_, value) in majority.items()}
    figures = majority_figures([*scores.values()], [task.domain for task in stream.tasks]) if scores else None
    metric_of_task = {task.name: task.metric for task in stream.tasks}
    scales = "; ".join(f"{metric}: {SCALE[metric]}" for metric in dict.fromkeys(metric_of_task.values()))
    by_run = last_by_task(results)
    page = f"\nEach task at the end of the stream; {scales}:\n\n"
    page += tasks_table(labels, metric_of_task, by_run, scores) + missing
    data = {
        "tasks": {f"{label}-seed{seed}": values for (label, seed), values in by_run.items()},
        "majority": {task: {"answer": answer, "value": value} for task, (answer, value) in majority.items()},
    }
    return figures, page, data


def unit_of(stream: Stream) -> str:
    """Return what the figures of a stream count."""
    return "points of each task's metric" if stream.tasks[0].is_instruction else "percent"


def tuning(
    arguments: argparse.Namespace, runs: Sequence[Run], stream: Stream, split: str, results: dict[Run, Result]
) -> tuple[str, dict[str, Any]]:
    """Return the Markdown page of the figures on a split per method and value, and the same as data."""
    key = arguments.tune.partition("=")[0]
    rows, table = [], []
    for run in runs:
        metrics = results[run].metrics if run in results else {}
        figures = {name: metrics.get(name) for name in PAIRED}
        rows.append([run.label, run.value or "–", *(cell([figures[name]]) for name in PAIRED)])
        table.append({"method": run.label, key: run.value, **figures})
    page = markdown(["Method", key, *(COLUMNS[name] for name in PAIRED)], rows)
    page += f"\nRecipe {arguments.recipe}, world size {arguments.ranks}, seed 0, "
    page += f"{unit_of(stream)} on the {split} split.\n"
    if split == "test":
        page += "\nWhat is chosen by this table is chosen on the test split, which is no measure of it any more.\n"
    return page, {"table": table}
