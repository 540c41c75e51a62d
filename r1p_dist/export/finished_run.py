"""What a run left to export: its configuration, its metrics and the updates of its finished tasks."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1p_dist.adapters import Update
from r1p_dist.checkpoint import load_updates, read_json
from r1p_dist.config import BackboneConfig, RunConfig
from r1p_dist.errors import InputError
from r1p_dist.export.merged import FrozenWeights, MergedWeights
from r1p_dist.kinds import kind_of
from r1p_dist.methods import INFERENCE_NEEDS, make_method
from r1p_dist.protocol import Method
from r1p_dist.recipes import load_config
from r1p_dist.run_files import ADAPTERS, CONFIG_FILE, FACTS_FILE, METRICS_FILE, UPDATES_FILE


@dataclass(frozen=True)
class TaskUpdate:
    """What one task left. updates: by layer (tower.block.layer, or a weight's name). folder: its name, index-task."""

    folder: str
    name: str
    updates: Mapping[str, Update]


@dataclass(frozen=True)
class FinishedRun:
    """A run with the tasks to export.

    metrics: as in metrics.json. places: of each adapted layer, the name of its weight and its rows. tasks: the chosen
    ones. deployed: those whose sum is the model after them. is_whole: whether that is the model of the whole run.
    """

    path: Path
    config: RunConfig
    metrics: dict
    base: FrozenWeights
    places: Mapping[str, tuple[str, slice]]
    tasks: Sequence[TaskUpdate]
    deployed: Sequence[TaskUpdate]
    is_whole: bool

    def merged_weights(self, tasks: Sequence[TaskUpdate]) -> MergedWeights:
        return MergedWeights(self.base, self.places, [task.updates for task in tasks])


def load_run(run_dir: Path, names: Sequence[str] | None = None) -> FinishedRun:
    """Reads a run; names: the tasks to choose, all finished ones by default.

    InputError: not the folder of a run, no such finished task, adapters of another model, other base weights.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise InputError(f"{run_dir}: no config.yaml there; give the folder of a run")
    config = load_config(run_dir / CONFIG_FILE)
    metrics = _read_metrics(run_dir / METRICS_FILE)
    base: FrozenWeights = kind_of(config.backbone.kind).part("export").frozen_weights(config.backbone)
    check_base(run_dir, config.backbone, base.identity)
    method = make_method(config, base.backbone)
    finished = finished_folders(run_dir)
    if method.inference != "merged":
        needed = INFERENCE_NEEDS[method.inference]
        raise InputError(f"{run_dir}: method={config.method} needs {needed} at inference, which no format can hold")
    if method.trains and not finished:
        raise InputError(f"{run_dir}/adapters: no finished task; export the run after its first")
    chosen = _choose(run_dir, method, finished, names)
    places = method.update_places()
    updates = [
        TaskUpdate(folder.name, name, load_updates(folder / UPDATES_FILE, places))
        for name, folder in finished.items()
        if name in chosen
    ]
    return FinishedRun(
        path=run_dir,
        config=config,
        metrics=metrics,
        base=base,
        places={layer: base.locate(weight, rows) for layer, (weight, rows) in places.items()},
        tasks=updates,
        deployed=[updates[index] for index in method.deployed(len(updates))],
        is_whole=len(updates) == len(finished),
    )


def _read_metrics(path: Path) -> dict:
    metrics = read_json(path)
    keys = ("tasks", "accuracy", "method")
    if not isinstance(metrics, dict) or any(key not in metrics for key in keys):
        raise InputError(f"{path}: not the metrics of a run; it needs the keys {', '.join(keys)}")
    return metrics


def finished_folders(run_dir: Path) -> dict[str, Path]:
    """Returns the folder of each finished task, in the run's order. InputError: one is missing between others."""
    found = {}
    for folder in (run_dir / ADAPTERS).glob("*"):
        match = re.fullmatch(r"(\d+)-(.+)", folder.name)
        if match and (folder / FACTS_FILE).is_file():
            found[int(match[1])] = match[2], folder
    if missing := [index for index in range(len(found)) if index not in found]:
        raise InputError(f"{run_dir}/adapters: task {missing[0]:02d} is missing; put its folder back")
    return {name: folder for _, (name, folder) in sorted(found.items())}


def _choose(run_dir: Path, method: Method, finished: Mapping[str, Path], names: Sequence[str] | None) -> list[str]:
    if names is None:
        return list(finished)
    if unknown := [name for name in names if name not in finished]:
        raise InputError(
            f"--tasks {unknown[0]}: no finished task of {run_dir}; there are {', '.join(finished) or 'none'}"
        )
    chosen = [name for name in finished if name in names]
    if not method.tasks_add_up and chosen != list(finished)[: len(chosen)]:
        raise InputError(
            f"--tasks {','.join(names)}: {method.config.method} keeps one update for all tasks up to a task; name the "
            f"first tasks of the run without a gap: {', '.join(finished)}"
        )
    return chosen


def check_base(run_dir: Path, config: BackboneConfig, identity: Mapping[str, str | None]) -> None:
    """Compares the base weights with those that the run's newest checkpoint names, where it has one.

    InputError: they are others.
    """
    states = sorted(run_dir.glob("checkpoints/*/*/state.json"))
    if not states:
        return
    try:
        trained_on = read_json(states[-1])["facts"]["backbone"]["sha256"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{states[-1]}: does not name the backbone; put back the run's own file") from error
    if trained_on != identity["sha256"]:
        raise InputError(
            f"{run_dir}/config.yaml: backbone.name={config.name} backbone.pretrained={config.pretrained}: weights with "
            f"sha256 {identity['sha256']}, the run was trained on {trained_on}; put that file back"
        )
