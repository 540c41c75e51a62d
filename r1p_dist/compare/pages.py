"""The pages of a comparison: what it found, in sections that become Markdown or HTML, and as data."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from r1p_dist.compare.costs import EXPLANATION, Costs, costs_by_run, costs_table
from r1p_dist.compare.runs import Run
from r1p_dist.data.stream import Stream
from r1p_dist.errors import InputError
from r1p_dist.evaluation.answers import SCALE
from r1p_dist.evaluation.comparison import (
    COLUMNS,
    FOLLOWING,
    MAJORITY,
    PAIRED,
    Figures,
    Key,
    Result,
    Table,
    cell,
    figures_by_run,
    following_by_task,
    following_table,
    last_by_task,
    learnt_table,
    majority_figures,
    overall_table,
    tasks_table,
)
from r1p_dist.evaluation.majority import majority_baselines
from r1p_dist.evaluation.paired import Answers, paired_differences, paired_table, ranks_by_last
from r1p_dist.evaluation.score_matrix import mean_of


@dataclass(frozen=True)
class Section:
    """A part of a page: a title, a table, a paragraph on it, and points. Texts are Markdown."""

    title: str = ""
    table: Table | None = None
    note: str = ""
    points: Sequence[str] = ()

    def markdown(self) -> str:
        parts = [
            f"{self.title}:\n" if self.title else "",
            self.table.markdown() if self.table else "",
            f"{self.note}\n" if self.note else "",
            "".join(f"- {point}\n" for point in self.points),
        ]
        return "\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Comparison:
    """What a comparison found. data: for comparison.json; unit: what the figures count."""

    unit: str
    figures: dict[Key, Figures]
    costs: dict[Key, Costs]
    sections: list[Section]
    data: dict[str, Any] = field(default_factory=dict)


def markdown_page(sections: Sequence[Section]) -> str:
    """Return the page; a section with nothing in it is left out."""
    return "\n".join(text for section in sections if (text := section.markdown()))


def comparison(
    arguments: argparse.Namespace,
    labels: Sequence[str],
    reference: str,
    stream: Stream,
    split: str,
    results: dict[Key, Result],
) -> Comparison:
    """Return what the runs say of the methods. reference: the label that the others are subtracted from."""
    figures, costs, answers = figures_by_run(results), costs_by_run(results), Answers(results)
    ranks = ranks_by_last(labels, answers)
    majority, tasks, tasks_data = None, [], {}
    if stream.tasks[0].is_instruction:
        majority, tasks, tasks_data = instruction_tasks(labels, stream, split, results)
    note = (
        f"Recipe {arguments.recipe}, world size {arguments.ranks}. {unit_of(stream).capitalize()} on the {split} "
        "split, mean ± sample standard deviation over the seeds. Recovered share: (Last - zero-shot) / "
        "(joint - zero-shot), per seed."
    )
    if ranks["ranks"]:
        seeds = ", ".join(map(str, ranks["seeds"]))
        note += f" Rank by Last over the seeds {seeds}, with 95 % over test samples, the same draws for all methods."
    unranked = [f"{label}: no rank, {reason}" for label, reason in ranks["missing"].items()]
    sections = [
        Section("", overall_table(labels, figures, ranks["ranks"], majority), note, unranked),
        Section("What is learnt and forgotten", learnt_table(labels, figures)),
        Section("What it costs", costs_table(labels, costs), EXPLANATION),
        *tasks,
    ]
    differences = {
        label: paired_differences(reference, label, answers, figures) for label in labels if label != reference
    }
    if differences:
        missing = [
            f"{label}: no interval, {pair['no_interval']}"
            for label, pair in differences.items()
            if "no_interval" in pair
        ]
        title = f"{reference} minus the other, paired over seeds, with 95 % over test samples"
        sections.append(Section(title, paired_table(differences), points=missing))
    data = {
        "runs": _by_name(figures),
        "costs": _by_name(costs),
        "ranks_by_last": ranks,
        "reference": reference,
        "paired": differences,
        **tasks_data,
    }
    return Comparison(unit_of(stream), figures, costs, sections, data)


def _by_name(values: Mapping[Key, Any]) -> dict[str, Any]:
    return {f"{label}-seed{seed}": of_run for (label, seed), of_run in values.items()}


def instruction_tasks(
    labels: Sequence[str], stream: Stream, split: str, results: dict[Key, Result]
) -> tuple[Figures | None, list[Section], dict[str, Any]]:
    """Return the figures of the majority answers, None where they cannot be had, the tables of tasks, and the data."""
    try:
        majority, missing = majority_baselines(stream, split), []
    except InputError as error:
        majority, missing = {}, [f"{MAJORITY}: missing, {error}"]
    scores = {task: value for task, (_, value) in majority.items()}
    figures = majority_figures([*scores.values()], [task.domain for task in stream.tasks]) if scores else None
    metric_of_task = {task.name: task.metric for task in stream.tasks}
    scales = "; ".join(f"{metric}: {SCALE[metric]}" for metric in dict.fromkeys(metric_of_task.values()))
    by_run, following = last_by_task(results), following_by_task(results)
    title = f"Each task at the end of the stream; {scales}"
    table = tasks_table(labels, metric_of_task, by_run, following, scores)
    sections = [Section(title, table, f"{FOLLOWING}: percent, right or wrong, mean over tasks.", missing)]
    in_form = {key: {"mean": mean_of(of_task.values()), "tasks": of_task} for key, of_task in following.items()}
    if any(of_run["mean"] is not None for of_run in in_form.values()):
        title = f"{FOLLOWING} at the end of the stream, percent"
        sections.append(Section(title, following_table(labels, metric_of_task, following)))
    data = {
        "tasks": _by_name(by_run),
        "instruction_following": _by_name(in_form),
        "majority": {task: {"answer": answer, "value": value} for task, (answer, value) in majority.items()},
    }
    return figures, sections, data


def unit_of(stream: Stream) -> str:
    """Return what the figures of a stream count."""
    return "points of each task's metric" if stream.tasks[0].is_instruction else "percent"


def tuning(
    arguments: argparse.Namespace, runs: Sequence[Run], stream: Stream, split: str, results: dict[Run, Result]
) -> tuple[list[Section], dict[str, Any]]:
    """Return the page of the figures on a split per method and value, and the same as data."""
    key = arguments.tune.partition("=")[0]
    rows, table = [], []
    for run in runs:
        metrics = results[run].metrics if run in results else {}
        figures = {name: metrics.get(name) for name in PAIRED}
        rows.append([run.label, run.value or "–", *(cell([figures[name]]) for name in PAIRED)])
        table.append({"method": run.label, key: run.value, **figures})
    note = f"Recipe {arguments.recipe}, world size {arguments.ranks}, seed 0, {unit_of(stream)} on the {split} split."
    sections = [Section("", Table(["Method", key, *(COLUMNS[name] for name in PAIRED)], rows), note)]
    if split == "test":
        warning = "What is chosen by this table is chosen on the test split, which is no measure of it any more."
        sections.append(Section(note=warning))
    return sections, {"table": table}
