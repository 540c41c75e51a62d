"""The runs of a comparison: which there are, and how each is started."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1p_dist.data.stream import Stream
from r1p_dist.errors import InputError
from r1p_dist.evaluation.comparison import ZERO_SHOT, Result
from r1p_dist.files import lock_file, write_atomically
from r1p_dist.local_ranks import environment, free_port
from r1p_dist.recipes import load_config
from r1p_dist.run_files import METRICS_FILE
from r1p_dist.shipped import checkout


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


class NotFinishedError(Exception):
    """Why a run that did not fail has no result yet."""


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
        else:
            asked = any(item.startswith("data.evaluate_on=") for item in overrides)
            split = [] if asked else ["data.evaluate_on=validation"]
            if label == ZERO_SHOT:
                choices = {"validation": (0, None, split)}
            else:
                choices = {
                    f"{key}={value}".replace(os.sep, "_"): (0, value, [f"{key}={value}", *split])
                    for value in values.split(",")
                }
        for name, (seed, value, chosen) in choices.items():
            folder = arguments.output.resolve() / f"{label}-{name}"
            complete = (*overrides, *chosen, f"seed={seed}")
            runs.append(Run(label, seed, folder, arguments.recipe, arguments.ranks, complete, value))
    return runs


def refusals(runs: Sequence[Run]) -> dict[str, str]:
    """Return why a label cannot be run, of those that cannot: a method for CLIPs alone, an override that it has not."""
    found = {}
    for run in runs:
        try:
            load_config(run.recipe, run.overrides)
        except InputError as error:
            found[run.label] = str(error).replace(f"{checkout()}/", "")  # pages are shown to others
    return found


def scored_stream(run: Run) -> tuple[Stream, str]:
    """Return the stream of a run and the split that it is scored on. InputError: wrong recipe, override or stream."""
    config = load_config(run.recipe, run.overrides)
    stream = Stream.load(config.stream, config.order, config.tasks).extended(config.extend)
    return stream, config.data.evaluate_on


def finish(run: Run, trains: bool = True) -> Result:
    """Return the result of the run, training first unless a finished one is there.

    trains: else one that is not finished stays so. NotFinishedError: why; RuntimeError: what failed.
    """
    if (result := _finished(run)) is not None:
        print("already there, ", end="")
        return result
    if not trains:
        raise NotFinishedError("not trained yet")
    with ExitStack() as held:
        try:
            # Only here: who looks at a run must not make the one skip it who is to train it.
            lock = held.enter_context(lock_file(run.folder.with_name(f".{run.folder.name}.lock"), waits=False))
        except BlockingIOError:
            raise NotFinishedError("being trained by another process") from None
        return _finished(run) or _train(run, lock.fileno())


def _finished(run: Run) -> Result | None:
    """Return the result of a run that is there; RuntimeError: it was made with other settings."""
    path = _record_path(run)
    record = json.loads(path.read_text()) if path.is_file() else None
    metrics = complete_metrics(run.folder)
    if metrics is None or (record is not None and not record["finished"]):
        return None
    if record is not None and record != run.record() | {"finished": True}:
        made_with = " ".join(record["overrides"])
        raise RuntimeError(
            f"{run.folder} is there, made with other settings (recipe {record['recipe']}, {record['ranks']} ranks, "
            f"{made_with}); delete it or choose another --output"
        )
    if metrics["world_size"] != run.ranks:
        raise RuntimeError(
            f"{run.folder} is there, made by {metrics['world_size']} ranks: --ranks {run.ranks} is wrong"
        )
    return Result(run.folder, metrics)


def _train(run: Run, lock: int) -> Result:
    """Train and return the result. lock: the file descriptor of a lock, which is held as long as the launcher lives."""
    write_atomically(_record_path(run), json.dumps(run.record() | {"finished": False}))
    log_path = run.folder.with_name(run.folder.name + ".log")
    variables = _environment(run.ranks)
    with open(log_path, "w", encoding="utf-8") as log:
        command = _command(run, variables)
        # The launcher holds the lock as well: it goes on where this process is killed.
        outputs = {"stdout": log, "stderr": subprocess.STDOUT, "pass_fds": [lock]}
        code = subprocess.run(command, env=variables, check=False, **outputs).returncode
    if code:
        raise RuntimeError(f"exit code {code}, {log_path}:\n{_why(log_path)}")
    metrics = complete_metrics(run.folder)
    if metrics is None:
        raise RuntimeError(f"exit code 0, but {run.folder / 'metrics.json'} is missing or not complete; see {log_path}")
    write_atomically(_record_path(run), json.dumps(run.record() | {"finished": True}))
    return Result(run.folder, metrics)


def _record_path(run: Run) -> Path:
    return run.folder.with_name(run.folder.name + ".json")


def complete_metrics(folder: Path) -> dict[str, Any] | None:
    """Return the metrics.json of a run that reached its end, else None."""
    try:
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        return metrics if metrics["last"] is not None else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _command(run: Run, variables: dict[str, str]) -> list[str]:
    deepspeed = shutil.which("deepspeed", path=variables["PATH"])
    if deepspeed is None:
        raise InputError("deepspeed: no such command; run this with the python of the environment that has it")
    # A port of its own, so that another training on this machine does not matter.
    head = [deepspeed, "--num_accelerators", str(run.ranks), "--master_port", str(free_port())]
    train = ["--no_local_rank", "--module", "r1p_dist", "train"]
    return [*head, *train, "--recipe", run.recipe, *run.overrides, f"run_dir={run.folder}"]


def _environment(ranks: int) -> dict[str, str]:
    """The environment `make train` gives, with the cores shared by the ranks."""
    # Without an activated environment, deepspeed and ninja are beside the interpreter only.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    return {"HF_HUB_OFFLINE": "1"} | environment(ranks) | {"PATH": path}


def _why(log_path: Path) -> str:
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    return "\n".join(f"    {line}" for line in errors[:1] or lines[-15:])
