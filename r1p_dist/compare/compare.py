"""A comparison from its runs to its page."""

import argparse
import json
import sys

from r1p_dist.compare.pages import comparison, tuning
from r1p_dist.compare.runs import Run, finish, plan_runs, scored_stream
from r1p_dist.compare.settings import read_settings, settings_path
from r1p_dist.errors import InputError
from r1p_dist.evaluation.comparison import COLUMNS, PAIRED, Result, cell
from r1p_dist.files import write_atomically


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
    labels = list(dict.fromkeys(arguments.methods.split(","))) if arguments.methods else list(settings)
    if not labels:
        raise InputError(f"{path}: has no label; write at least one method into it or name them with --methods")
    runs = plan_runs(arguments, labels, seeds, settings)
    stream, split = scored_stream(runs[0])
    arguments.output.mkdir(parents=True, exist_ok=True)

    results: dict[Run, Result] = {}
    failures: dict[Run, str] = {}
    for number, run in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {run.folder.name}: ", end="", flush=True)
        try:
            results[run] = finish(run)
        except RuntimeError as failure:
            failures[run] = str(failure)
            print(f"FAILED: {failure}", flush=True)
        else:
            metrics = results[run].metrics
            print(", ".join(f"{COLUMNS[key]} {cell([metrics.get(key)])}" for key in PAIRED), flush=True)

    if arguments.tune:
        name, (page, data) = (
            f"tuning-{arguments.tune.partition('=')[0]}",
            tuning(arguments, runs, stream, split, results),
        )
    else:
        by_seed = {(run.label, run.seed): result for run, result in results.items()}
        name, (page, data) = "comparison", comparison(arguments, labels, stream, split, by_seed)
    used = {label: [*settings.get(label, []), *arguments.overrides] for label in labels}
    page += "\n" + "".join(f"- {label}: recipe and `{' '.join(used[label])}`\n" for label in labels if used[label])
    if failures:
        page += "\nFailed runs:\n\n" + "".join(
            f"- {run.folder.name}: {' '.join(failures[run].split())}\n" for run in failures
        )
    data |= {
        "recipe": arguments.recipe,
        "ranks": arguments.ranks,
        "overrides": used,
        "failures": {run.folder.name: text for run, text in failures.items()},
    }
    write_atomically(arguments.output / f"{name}.md", page)
    write_atomically(arguments.output / f"{name}.json", json.dumps(data, indent=1) + "\n")
    print(f"\n{page}")
    if failures:
        print(f"{len(failures)} of {len(runs)} runs failed, see above", file=sys.stderr)
    return 1 if failures else 0
