"""What each run of a comparison costs: numbers, bytes, time, and what its model needs later."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from r1p_dist.evaluation.comparison import PLAIN, Key, Result, Table, cell, runs_of
from r1p_dist.method_list import describe_all
from r1p_dist.methods import INFERENCE_NEEDS
from r1p_dist.run_files import LOG_FILE, MEMORY_FILE, UPDATES_FILE, last_stage_folder

COLUMNS = {
    "trained": "Trained numbers",
    "update_mb": "Update, MB",
    "memory_mb": "Memory, MB",
    "step_time": f"Step time / {PLAIN}'s",
    "minutes": "Minutes",
    "inference": "Inference needs",
}
EXPLANATION = (
    "MB that the last task alone left in the run's folder: its update, and the memory that later tasks train with; "
    "samples and weights that are read again are in neither. Step time: by the median of the logged samples per "
    f"second, against {PLAIN} of the same seed; it says little where several runs shared a machine."
)

Costs = dict[str, float | str | None]


def costs_by_run(results: Mapping[Key, Result]) -> dict[Key, Costs]:
    """Return (label, seed) -> the costs of COLUMNS; None where not known."""
    needed = {description.name: description.inference for description in describe_all()}
    speeds = {key: _samples_per_second(result.folder) for key, result in results.items()}
    return {
        (label, seed): {
            **_costs(result, needed),
            "step_time": _ratio(speeds.get((PLAIN, seed)), speeds[label, seed]),
        }
        for (label, seed), result in results.items()
    }


def _costs(result: Result, needed: Mapping[str, str]) -> Costs:
    metrics, left = result.metrics, last_stage_folder(result.folder)
    seconds = metrics.get("wall_seconds")
    # a run says itself what its options make of it; one that is older does not
    inference = metrics.get("inference") or needed.get(metrics.get("method", ""))
    return {
        "trained": metrics.get("trainable_parameters"),
        "update_mb": _megabytes(left, UPDATES_FILE),
        "memory_mb": _megabytes(left, MEMORY_FILE),
        "minutes": None if seconds is None else seconds / 60,
        "inference": None if inference is None else INFERENCE_NEEDS[inference],
    }


def _megabytes(folder: Path | None, name: str) -> float | None:
    return (folder / name).stat().st_size / 1e6 if folder is not None and (folder / name).is_file() else None


def _samples_per_second(folder: Path) -> float | None:
    """Returns the median of what the run logged; None where it trained nothing."""
    path = folder / LOG_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    speeds = [speed for line in lines if (speed := json.loads(line).get("samples_per_second"))]
    return median(speeds) if speeds else None


def _ratio(plain: float | None, own: float | None) -> float | None:
    return None if plain is None or own is None else plain / own


def costs_table(labels: Sequence[str], costs: Mapping[Key, Costs]) -> Table:
    """Return the table method x COLUMNS: means over seeds, times ± sample standard deviation."""
    return Table(["Method", *COLUMNS.values()], [[label, *_cells(runs_of(label, costs))] for label in labels])


def _cells(runs: Sequence[Costs]) -> list[str]:
    known = {name: [run[name] for run in runs if run[name] is not None] for name in COLUMNS}
    return [
        f"{fmean(known['trained']):,.0f}" if known["trained"] else "–",
        *(f"{fmean(known[name]):,.2f}" if known[name] else "–" for name in ("update_mb", "memory_mb")),
        cell(known["step_time"], digits=2),
        cell(known["minutes"]),
        ", ".join(dict.fromkeys(known["inference"])) or "–",
    ]
