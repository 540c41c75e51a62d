"""What each task left in which layer: the votes for its experts, its updates, and what they do to past inputs.

Read from adapters/ (the updates and the drift) and, where it is there, from the checkpoint of each task's end (the
votes). Of models with many layers some stand for all, so that this takes a moment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from r1p_dist.files import read_mapping
from r1p_dist.page.parts import Columns, Fold, Heat, HeatCell, Part, Text, number
from r1p_dist.report.run import RunFiles
from r1p_dist.run_files import CHECKPOINTS, FACTS_FILE, METHOD_FILE, UPDATES_FILE, stage_folder

LAYERS = 48  # that are looked at
STAGES = 24  # the last ones
_VOTES = ".activation_counts"


@dataclass(frozen=True)
class Left:
    """What a stage left. A (k, in) and B (out, k) by layer, with B times the scaling; votes (rank,) by layer.

    drift: by layer, how far its output on past tasks' inputs moved, as a share of it.
    """

    name: str
    updates: dict[str, tuple[np.ndarray, np.ndarray]]
    votes: dict[str, np.ndarray]
    drift: dict[str, float]


def layers(run: RunFiles) -> list[Part]:
    """Return the maps layer x task, task x task and layer x expert; nothing where tasks leave no low-rank update."""
    left = _read(run)
    names = [name for name in next((stage.updates for stage in left), {}) if all(name in s.updates for s in left)]
    if not names:
        return []
    tables = [_sizes(left, names), *_drifts(left, names), *([_overlaps(left, names)] if len(left) > 1 else [])]
    parts: list[Part] = [Columns(tables, is_wide=True)]
    merged = run.config.get("options", {}).get("merged")
    maps = [Fold(stage.name, [_votes(stage, merged)]) for stage in left if stage.votes]
    return [*parts, Text("Experts, by the votes of the samples:"), *maps] if maps else parts


def _read(run: RunFiles) -> list[Left]:
    stages = run.matrix.tasks if not run.matrix.is_joint else []
    found = []
    for index, name in list(enumerate(stages))[-STAGES:]:
        folder = stage_folder(run.folder, index, name)
        # written last: the folder is whole
        if (folder / FACTS_FILE).is_file():
            votes = _read_votes(run.folder / CHECKPOINTS / folder.name)
            drift = _read_drift(folder / FACTS_FILE)
            found.append(Left(name, _read_updates(folder / UPDATES_FILE), votes, drift))
    return [stage for stage in found if stage.updates]


def _read_updates(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    try:
        with safe_open(path, "np") as file:
            keys = set(file.keys())
            names = _chosen(sorted((key[:-2] for key in keys if key.endswith(".A")), key=_order))
            return {
                name: (
                    file.get_tensor(f"{name}.A"),
                    float(file.get_tensor(f"{name}.scaling")) * file.get_tensor(f"{name}.B"),
                )
                for name in names
                if {f"{name}.B", f"{name}.scaling"} <= keys
            }
    except (SafetensorError, OSError):
        return {}


def _read_votes(folder: Path) -> dict[str, np.ndarray]:
    steps = sorted(folder.glob(f"step-*/{METHOD_FILE}"), key=lambda path: int(path.parent.name.partition("-")[2]))
    if not steps:
        return {}
    try:
        with safe_open(steps[-1], "np") as file:
            names = sorted((key for key in file.keys() if key.endswith(_VOTES)), key=_order)  # noqa: SIM118
            votes = {name.removesuffix(_VOTES): file.get_tensor(name) for name in _chosen(names)}
    except (SafetensorError, OSError):
        return {}
    return {name: counts for name, counts in votes.items() if counts.sum() > 0}


def _read_drift(path: Path) -> dict[str, float]:
    """Returns what there is; runs of before it was measured have none."""
    layers = read_mapping(path).get("layers", {})
    return {name: layer["drift"] for name, layer in layers.items() if "drift" in layer}


def _order(name: str) -> list[tuple[int, str]]:
    """Returns what puts image.2.q before image.10.q."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _chosen(names: Sequence[str]) -> list[str]:
    """Returns at most LAYERS names, spread evenly."""
    count = min(len(names), LAYERS)
    return [names[at * len(names) // count] for at in range(count)]


def _sizes(left: Sequence[Left], names: Sequence[str]) -> Heat:
    rows = []
    values = {(name, stage.name): _norm(*stage.updates[name]) for name in names for stage in left}
    most = max(values.values()) or 1.0
    for name in names:
        cells = []
        for stage in left:
            value = values[name, stage.name]
            title = f"{name}, {stage.name}: {value:.3g}"
            cells.append(HeatCell(f"{value:.2f}", "", value / most, title))
        rows.append((name, cells))
    caption = "Frobenius norm of what a task adds to the weight of a layer: where it changed the model."
    if len(names) == LAYERS:
        caption += f" Of the layers, {LAYERS} are shown."
    return Heat("size of the updates, layer by task", [stage.name for stage in left], rows, ("norm",), caption)


def _drifts(left: Sequence[Left], names: Sequence[str]) -> list[Heat]:
    """Return the map of the drift; none where no stage has any, as of one task alone."""
    stages = [stage for stage in left if stage.drift]
    names = [name for name in names if any(name in stage.drift for stage in stages)]
    if not names:
        return []
    most = max(stage.drift.get(name, 0.0) for stage in stages for name in names) or 1.0
    rows = []
    for name in names:
        values = [(stage.name, stage.drift.get(name)) for stage in stages]
        cells = [
            HeatCell("–")
            if value is None
            else HeatCell(number(100 * value), "", -value / most, f"{name}, {task}: {100 * value:.3g} percent")
            for task, value in values
        ]
        rows.append((name, cells))
    caption = (
        "How far a task moved what a layer gives out on the test inputs of the tasks before it, in percent of that "
        "output: where it may be forgetting."
    )
    return [Heat("drift on past inputs, layer by task", [stage.name for stage in stages], rows, ("drift",), caption)]


def _norm(A: np.ndarray, B: np.ndarray) -> float:
    """Returns ||B A|| without forming it."""
    return float(np.sqrt(max(0.0, np.sum((B.T @ B) * (A @ A.T)))))


def _overlaps(left: Sequence[Left], names: Sequence[str]) -> Heat:
    """Return the mean |cosine| between the columns of B of two tasks, over all pairs of columns and all layers."""
    count = len(left)
    total = np.zeros((count, count))
    for name in names:
        units = [_unit(stage.updates[name][1]) for stage in left]
        total += [[np.abs(a.T @ b).mean() for b in units] for a in units]
    shares = total / len(names)
    apart = [shares[i, j] for i in range(count) for j in range(count) if i != j]
    low, high = min(apart), max(apart)
    rows = []
    for i, stage in enumerate(left):
        cells = []
        for j, other in enumerate(left):
            if i == j:
                cells.append(HeatCell("·", title=stage.name))
                continue
            value = float(shares[i, j])
            shade = -(value - low) / (high - low) if high > low else 0.0
            cells.append(HeatCell(f"{value:.3f}", "", shade, f"{stage.name} and {other.name}: {value:.4f}"))
        rows.append((stage.name, cells))
    caption = (
        "How much two tasks write to the same directions: the mean of `|b_i^T b_j|` over unit columns of their B, "
        "0 where they are orthogonal; the darkest pair shares most."
    )
    return Heat("overlap of the tasks' updates", [stage.name for stage in left], rows, ("overlap",), caption)


def _unit(B: np.ndarray) -> np.ndarray:
    return B / np.maximum(np.linalg.norm(B, axis=0, keepdims=True), 1e-12)


def _votes(stage: Left, merged: int | None) -> Heat:
    rank = max(len(counts) for counts in stage.votes.values())
    rows = []
    for name, counts in stage.votes.items():
        shares = counts / counts.sum()
        # ties go to the lower index, as in the merge
        chosen = set(np.argsort(-counts, kind="stable")[:merged].tolist()) if merged else set()
        cells = [
            HeatCell(
                f"{100 * share:.0f}",
                "",
                share / shares.max(),
                f"{name}, expert {j}: {int(counts[j]):,} votes",
                j in chosen,
            )
            for j, share in enumerate(shares.tolist())
        ]
        rows.append((name, cells + [HeatCell("–")] * (rank - len(cells))))
    caption = "Percent of a layer's votes that went to each expert of its pool; a framed one was merged."
    return Heat(f"votes for the experts in {stage.name}", [str(j) for j in range(rank)], rows, ("votes",), caption)
