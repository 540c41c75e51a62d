"""The README.md of an exported folder: what it holds, how to load it, how well it did, and whose licence it has."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from r1p_dist.config import BackboneConfig
from r1p_dist.data.stream import ASSETS
from r1p_dist.evaluation.answers import SCALE
from r1p_dist.export.finished_run import FinishedRun, TaskUpdate
from r1p_dist.files import write_atomically
from r1p_dist.kinds import kind_of

_FIGURES = {
    "transfer": "Transfer: tasks not trained yet",
    "average": "Average: all tasks, all moments of the stream",
    "last": "Last: all tasks after the last one",
}


def write_card(
    folder: Path,
    run: FinishedRun,
    tasks: Sequence[TaskUpdate],
    library: str,
    usage: str,
    notes: Sequence[str] = (),
) -> None:
    """Writes README.md, and beside it NOTICE.md for weights that need one.

    tasks: whose updates the folder holds, none for the base model alone. library: what loads it; usage: how, in Python.
    """
    kind = kind_of(run.config.backbone.kind)
    name, stream, sha256 = _model_name(run.config.backbone), _stream_name(run), run.base.identity["sha256"]
    updates = f"the updates of {', '.join(task.name for task in tasks)}" if tasks else "no update: the base model alone"
    head = {"library_name": library, "pipeline_tag": kind.pipeline, "license": "other"}
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name} with {run.config.method} on {stream}" if tasks else f"# {name}",
        f"Made by r1p_dist from {kind.made_from}; holds {updates}.",
        *notes,
        "## How to load it",
        f"```python\n{usage}\n```",
        *(_results(run, tasks) if tasks else []),
        "## How it was made",
        *(_training(run, stream) if tasks else []),
        f"Base model: {name}{_weights_name(run.config.backbone)}; SHA-256 of its weights: {sha256}",
        "## Licence",
        _licence(run.config.backbone),
    ]
    write_atomically(folder / "README.md", "\n\n".join(lines) + "\n")
    if run.config.backbone.name == "tiny":
        shutil.copyfile(ASSETS / "NOTICE.md", folder / "NOTICE.md")


def _results(run: FinishedRun, tasks: Sequence[TaskUpdate]) -> list[str]:
    metrics = run.metrics
    rows = [row for row in metrics["accuracy"] if row]
    is_measured = run.is_whole and list(tasks) == list(run.deployed)
    measured = (
        "Measured in the run, in its own precision, with the updates that this folder holds."
        if is_measured
        else "These figures are those of the run with all of its tasks; this folder holds other updates."
    )
    figures = [f"| {meaning} | {_number(metrics.get(key))} |" for key, meaning in _FIGURES.items()]
    table = ["| Task | Metric | Zero-shot | After the last task |", "| --- | --- | ---: | ---: |"]
    kinds = metrics.get("metric") or ["accuracy"] * len(metrics["tasks"])
    for name, kind, before, after in zip(metrics["tasks"], kinds, rows[0], rows[-1], strict=True):
        scale = SCALE.get(kind, "percent")
        table.append(f"| {name} | {kind}, {scale} | {_number(before)} | {_number(after)} |")
    return [
        "## Scores",
        measured,
        "\n".join(["| Figure | |", "| --- | ---: |", *figures]),
        "\n".join(table),
    ]


def _training(run: FinishedRun, stream: str) -> list[str]:
    keys = {"method", "seed", "order", *(("options", "targets", "train") if run.tasks else ())}
    summary = run.config.model_dump(mode="json", include=keys)
    return [
        f"Trained on the stream {stream}, its tasks one after another in the order of the table, with:",
        f"```yaml\n{yaml.safe_dump(summary, sort_keys=False, allow_unicode=True)}```",
    ]


def _stream_name(run: FinishedRun) -> str:
    path = Path(run.config.stream)  # a name, a folder or the stream.yaml in one
    return path.parent.name if path.name == "stream.yaml" else path.stem


def _model_name(config: BackboneConfig) -> str:
    source = config.name.removeprefix("local-dir:")
    return Path(source).name if Path(source).is_dir() else config.name


def _weights_name(config: BackboneConfig) -> str:
    pretrained = f", pretrained={Path(config.pretrained).name}" if config.pretrained else ""
    return f"{pretrained}, force_quick_gelu" if config.force_quick_gelu else pretrained


def _licence(config: BackboneConfig) -> str:
    if config.name == "tiny":
        section = kind_of(config.kind).notice
        return (
            f"The weights keep the licences of what the base model was trained on: NOTICE.md, its section on {section}."
        )
    return "The weights keep the licence of the base model; look it up where that comes from."


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
