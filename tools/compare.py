"""Compare methods on one stream: run each with several seeds and tabulate.

    python tools/compare.py --output runs/compare
    python tools/compare.py --output runs/compare --methods lora,dac --seeds 0,1 train.iterations=50
    python tools/compare.py --output runs/tune --methods lora,dac --tune train.lr=2e-3,5e-3,1e-2
    python tools/compare.py --output runs/compare_instruct --recipe mini_instruct

Every run is `deepspeed launchers/train.py` in DIR/<method>-seed<k>, its output in DIR/<method>-seed<k>.log; a finished
one is not run again. What each method gets beside the recipe stands in tools/compare_<recipe>.yaml. Results:
comparison.md and comparison.json in DIR; for instruction tasks also every task's value, beside that of the most
frequent training answer. `--tune` evaluates on the validation split,
with seed 0, and leaves the choice to you: copy it into the settings file. Exit code 1 when a run failed; the others
are tabulated.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from r1p_dist.data.stream import Stream
from r1p_dist.doctor import ALLOCATOR_VALUE, ALLOCATOR_VARIABLES
from r1p_dist.errors import InputError
from r1p_dist.evaluation.answers import SCALE
from r1p_dist.evaluation.comparison import (
    COLUMNS,
    MAJORITY,
    PAIRED,
    REFERENCE,
    ZERO_SHOT,
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
from r1p_dist.files import write_atomically
from r1p_dist.recipes import load_config

LAUNCHER = Path(__file__).resolve().parents[1] / "launchers" / "train.py"


@dataclass(frozen=True)
class Run:
    """One training: which method (label of the settings file), seed and, when tuning, value; and how it is started."""

    label: str
    seed: int
    folder: Path
    recipe: str
    ranks: int
    overrides: tuple[str, ...]
    value: str | None = None

    def record(self) -> dict[str, Any]:
        """What its result depends on; not the folder, which may be moved."""
        return {"recipe": self.recipe, "ranks": self.ranks, "overrides": list(self.overrides)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run and tabulate; return 0, 1 (a run failed) or 2 (wrong input)."""
    try:
        return _compare(_arguments(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--methods", help="labels, comma-separated; default: all of the settings file")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--recipe", default="mini_mtil")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--settings", type=Path, help="YAML: label -> list of key=value; default: tools/compare_<recipe>.yaml"
    )
    parser.add_argument("--tune", metavar="KEY=V1,V2,...", help="compare values of one key on the validation split")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, over the settings file")
    return parser.parse_intermixed_args(argv)


def _compare(arguments: argparse.Namespace) -> int:
    try:
        seeds = list(dict.fromkeys(int(seed) for seed in arguments.seeds.split(",")))
    except ValueError:
        raise InputError(f"--seeds {arguments.seeds}: not whole numbers separated by commas") from None
    reserved = {"method", "seed", "run_dir"} | ({"data.evaluate_on"} if arguments.tune else set())
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
        name, (page, data) = f"tuning-{arguments.tune.partition('=')[0]}", tuning(arguments, runs, stream, results)
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


def settings_path(recipe: str) -> Path:
    """Return where the settings of a recipe, a name or a file, lie beside this tool."""
    return Path(__file__).with_name(f"compare_{Path(recipe).stem}.yaml")


def read_settings(path: Path) -> dict[str, list[str]]:
    """Return label -> overrides of a settings file."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise InputError(f"--settings {path}: no such file; write it or name another one with --settings") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: has to be a mapping of method label to a list of key=value")
    for label, overrides in settings.items():
        if not isinstance(overrides, list) or not all(isinstance(item, str) and "=" in item for item in overrides):
            raise InputError(f"{path}: {label}: {overrides!r} is not a list of key=value texts")
    return {str(label): overrides for label, overrides in settings.items()}


def plan_runs(
    arguments: argparse.Namespace, labels: Sequence[str], seeds: Sequence[int], settings: dict[str, list[str]]
) -> list[Run]:
    """Return the runs in order; zero-shot, which nothing random touches, once."""
    key, _, values = (arguments.tune or "").partition("=")
    if arguments.tune and not (key and values):
        raise InputError(f"--tune {arguments.tune}: has to be KEY=V1,V2,...")
    runs = []
    for label in labels:
        overrides = [*settings.get(label, []), *arguments.overrides]
        if not any(item.startswith("method=") for item in overrides):
            overrides.insert(0, f"method={label}")
        if not arguments.tune:
            choices = {f"seed{seed}": (seed, None, []) for seed in (seeds[:1] if label == ZERO_SHOT else seeds)}
        elif label == ZERO_SHOT:
            choices = {"validation": (0, None, ["data.evaluate_on=validation"])}
        else:
            choices = {
                f"{key}={value}".replace(os.sep, "_"): (0, value, [f"{key}={value}", "data.evaluate_on=validation"])
                for value in values.split(",")
            }
        for name, (seed, value, chosen) in choices.items():
            folder = arguments.output.resolve() / f"{label}-{name}"
            complete = (*overrides, *chosen, f"seed={seed}")
            runs.append(Run(label, seed, folder, arguments.recipe, arguments.ranks, complete, value))
    return runs


def scored_stream(run: Run) -> tuple[Stream, str]:
    """Return the stream of a run and the split that it is scored on. InputError: wrong recipe, override or stream."""
    config = load_config(run.recipe, run.overrides)
    stream = Stream.load(config.stream, config.order, config.tasks).extended(config.extend)
    return stream, config.data.evaluate_on


# Running


def finish(run: Run) -> Result:
    """Return the result of the run, training first unless a finished one is there; RuntimeError says what failed."""
    record_path = run.folder.with_name(run.folder.name + ".json")
    record = json.loads(record_path.read_text()) if record_path.is_file() else None
    metrics = complete_metrics(run.folder)
    if metrics is not None and (record is None or record["finished"]):
        if record is not None and record != run.record() | {"finished": True}:
            made_with = " ".join(record["overrides"])
            raise RuntimeError(
                f"{run.folder} is there, made with other settings (recipe {record['recipe']}, {record['ranks']} ranks, "
                f"{made_with}); delete it or choose another --output"
            )
        print("already there, ", end="")
        return Result(run.folder, metrics)

    write_atomically(record_path, json.dumps(run.record() | {"finished": False}))
    log_path = run.folder.with_name(run.folder.name + ".log")
    environment = _environment(run.ranks)
    with open(log_path, "w", encoding="utf-8") as log:
        command = _command(run, environment)
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise RuntimeError(f"exit code {code}, {log_path}:\n{_why(log_path)}")
    metrics = complete_metrics(run.folder)
    if metrics is None:
        raise RuntimeError(f"exit code 0, but {run.folder / 'metrics.json'} is missing or not complete; see {log_path}")
    write_atomically(record_path, json.dumps(run.record() | {"finished": True}))
    return Result(run.folder, metrics)


def complete_metrics(folder: Path) -> dict[str, Any] | None:
    """Return the metrics.json of a run that reached its end, else None."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return metrics if metrics["last"] is not None else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _command(run: Run, environment: dict[str, str]) -> list[str]:
    deepspeed = shutil.which("deepspeed", path=environment["PATH"])
    if deepspeed is None:
        raise InputError("deepspeed: no such command; run this with the python of the environment that has it")
    # A port of its own, so that another training on this machine does not matter.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    head = [deepspeed, "--num_accelerators", str(run.ranks), "--master_port", str(port)]
    return [*head, str(LAUNCHER), "--recipe", run.recipe, *run.overrides, f"run_dir={run.folder}"]


def _environment(ranks: int) -> dict[str, str]:
    """The environment `make train` gives, with the cores shared by the ranks."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    defaults = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    defaults |= dict.fromkeys(ALLOCATOR_VARIABLES, str(ALLOCATOR_VALUE))
    # Without an activated environment, deepspeed and ninja are beside the interpreter only.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    return defaults | os.environ | {"PATH": path}


def _why(log_path: Path) -> str:
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    return "\n".join(f"    {line}" for line in errors[:1] or lines[-15:])


# Pages


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
        f"\nRecipe {arguments.recipe}, world size {arguments.ranks}. {unit_of(stream).capitalize()}, mean ± sample "
        "standard deviation over the seeds. Recovered share: (Last - zero-shot) / (joint - zero-shot), per seed.\n"
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
    arguments: argparse.Namespace, runs: Sequence[Run], stream: Stream, results: dict[Run, Result]
) -> tuple[str, dict[str, Any]]:
    """Return the Markdown page of the validation figures per method and value, and the same as data."""
    key = arguments.tune.partition("=")[0]
    rows, table = [], []
    for run in runs:
        metrics = results[run].metrics if run in results else {}
        figures = {name: metrics.get(name) for name in PAIRED}
        rows.append([run.label, run.value or "–", *(cell([figures[name]]) for name in PAIRED)])
        table.append({"method": run.label, key: run.value, **figures})
    page = markdown(["Method", key, *(COLUMNS[name] for name in PAIRED)], rows)
    page += f"\nRecipe {arguments.recipe}, world size {arguments.ranks}, seed 0, "
    page += f"{unit_of(stream)} on the validation split.\n"
    return page, {"table": table}


if __name__ == "__main__":
    sys.exit(main())
