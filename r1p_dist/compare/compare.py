"""A comparison from its runs to its page."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from r1p_dist.compare.output import further_files, page_files, write_files
from r1p_dist.compare.pages import Section, comparison, markdown_page, tuning
from r1p_dist.compare.runs import NotFinishedError, Run, finish, plan_runs, refusals, scored_stream
from r1p_dist.compare.settings import labels_of, read_settings, settings_path
from r1p_dist.errors import InputError, one_line
from r1p_dist.evaluation.comparison import COLUMNS, PAIRED, REFERENCE, Result, cell


def compare(arguments: argparse.Namespace) -> int:
    """Runs and tabulates what the arguments of main.py ask for; returns 0, or 1 where a run failed."""
    try:
        seeds = list(dict.fromkeys(int(seed) for seed in arguments.seeds.split(",")))
    except ValueError:
        raise InputError(f"--seeds {arguments.seeds}: not whole numbers separated by commas") from None
    reserved = {"method", "seed", "run_dir"}
    for override in arguments.overrides:
        if override.partition("=")[0] in reserved:
            raise InputError(f"{override}: this tool sets {override.partition('=')[0]} itself, for every run")
    path = arguments.settings or settings_path(arguments.recipe)
    settings = read_settings(path)
    labels = labels_of(arguments.methods, settings)
    if not labels:
        raise InputError(f"{path}: has no label; write at least one method into it or name them with --methods")
    runs = plan_runs(arguments, labels, seeds, settings)
    stream, split = scored_stream(runs[0])
    # `all` asks for no method in particular, so one that does not go with the recipe is left out
    asked = {*settings, *(arguments.methods or "").split(",")}
    refused = refusals([run for run in runs if run.label not in asked])
    runs = [run for run in runs if run.label not in refused]
    labels = [label for label in labels if label not in refused]
    reference = _reference(arguments.reference, labels)

    arguments.output.mkdir(parents=True, exist_ok=True)
    outcome = _finish_all(runs, trains=not arguments.tabulate)
    used = {label: [*settings.get(label, []), *arguments.overrides] for label in labels}
    facts = {
        "recipe": arguments.recipe,
        "ranks": arguments.ranks,
        "overrides": used,
        "left_out": refused,
        "not_finished": {run.folder.name: why for run, why in outcome.unfinished.items()},
        "failures": {run.folder.name: why for run, why in outcome.failures.items()},
    }
    remarks = [
        Section(points=[f"{label}: recipe and `{' '.join(used[label])}`" for label in labels if used[label]]),
        Section("Left out", points=_points(refused)),
        Section("Not finished", points=_by_reason(facts["not_finished"])),
        Section("Failed runs", points=_points(facts["failures"])),
    ]
    remarks = [section for section in remarks if section.points]
    if arguments.tune:
        sections, data = tuning(arguments, runs, stream, split, outcome.results)
        sections += remarks
        files = page_files(f"tuning-{arguments.tune.partition('=')[0]}", sections, data | facts)
    else:
        by_seed = {(run.label, run.seed): result for run, result in outcome.results.items()}
        found = comparison(arguments, labels, reference, stream, split, by_seed)
        sections = found.sections
        sections += remarks
        files = page_files("comparison", sections, found.data | facts)
        files |= further_files(f"Comparison {arguments.output.resolve().name}", arguments.output, found)
    write_files(arguments.output, files)
    print(f"\n{markdown_page(sections)}")
    if outcome.failures:
        print(f"{len(outcome.failures)} of {len(runs)} runs failed, see above", file=sys.stderr)
    return 1 if outcome.failures else 0


@dataclass
class _Outcome:
    """What became of the runs: a result, or why there is none."""

    results: dict[Run, Result] = field(default_factory=dict)
    unfinished: dict[Run, str] = field(default_factory=dict)
    failures: dict[Run, str] = field(default_factory=dict)


def _finish_all(runs: Sequence[Run], trains: bool) -> _Outcome:
    outcome = _Outcome()
    for number, run in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {run.folder.name}: ", end="", flush=True)
        try:
            outcome.results[run] = finish(run, trains)
        except NotFinishedError as reason:
            outcome.unfinished[run] = str(reason)
            print(f"skipped, {reason}", flush=True)
        except RuntimeError as failure:
            outcome.failures[run] = str(failure)
            print(f"FAILED: {failure}", flush=True)
        else:
            metrics = outcome.results[run].metrics
            print(", ".join(f"{COLUMNS[key]} {cell([metrics.get(key)])}" for key in PAIRED), flush=True)
    return outcome


def _reference(asked: str | None, labels: Sequence[str]) -> str:
    if asked is not None and asked not in labels:
        raise InputError(f"--reference {asked}: is not compared; choose one of {', '.join(labels)}")
    return asked or (REFERENCE if REFERENCE in labels else labels[0])


def _points(reasons: Mapping[str, str]) -> list[str]:
    return [f"{name}: {one_line(reason)}" for name, reason in reasons.items()]


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"{reason}: {', '.join(of_it)}" for reason, of_it in names.items()]
