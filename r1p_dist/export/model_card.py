"""The README.md of an exported folder: what it holds, how to load it, how well it did, and whose licence it has."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData

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
    title = f"{name} with {run.config.method} on {stream}" if tasks else name
    head = ModelCardData(
        library_name=library,
        pipeline_tag=kind.pipeline,
        license="other",
        tags=["continual-learning", *([run.config.method] if tasks else [])],
        model_name=title,
        eval_results=_eval_results(run, stream) if _are_of(run, tasks) else None,
    )
    lines = [
        f"---\n{head.to_yaml()}\n---",
        f"# {title}",
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


def _are_of(run: FinishedRun, tasks: Sequence[TaskUpdate]) -> bool:
    """Returns whether the run's scores are those of a model with these updates."""
    return bool(tasks) and run.is_whole and list(tasks) == list(run.deployed)


def _scores(run: FinishedRun) -> list[tuple[str, str, float, float]]:
    """Returns each task with its metric, and its scores by the base model and after the last task."""
    metrics = run.metrics
    rows = [row for row in metrics["accuracy"] if row]
    kinds = metrics.get("metric") or ["accuracy"] * len(metrics["tasks"])
    return list(zip(metrics["tasks"], kinds, rows[0], rows[-1], strict=True))


def _eval_results(run: FinishedRun, stream: str) -> list[EvalResult]:
    """Returns the last scores as the hub's pages read them."""
    pipeline, split = kind_of(run.config.backbone.kind).pipeline, run.config.data.evaluate_on
    return [
        EvalResult(
            task_type=pipeline,
            dataset_type=stream,
            dataset_name=task,
            dataset_config=task,  # results of one configuration become one
            dataset_split=split,
            metric_type=metric,
            metric_value=round(after, 2),
        )
        for task, metric, _, after in _scores(run)
    ]


def _results(run: FinishedRun, tasks: Sequence[TaskUpdate]) -> list[str]:
    metrics = run.metrics
    measured = (
        "Measured in the run, in its own precision, with the updates that this folder holds."
        if _are_of(run, tasks)
        else "These figures are those of the run with all of its tasks; this folder holds other updates."
    )
    figures = [f"| {meaning} | {_number(metrics.get(key))} |" for key, meaning in _FIGURES.items()]
    table = ["| Task | Metric | Zero-shot | After the last task |", "| --- | --- | ---: | ---: |"]
    for name, kind, before, after in _scores(run):
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
