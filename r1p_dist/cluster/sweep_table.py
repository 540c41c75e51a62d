"""What a sweep has found so far: sweep.csv, and report.html with the best point and curves."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from r1p_dist.cluster.runs import RunState, describe_runs, describe_without_cluster
from r1p_dist.errors import InputError
from r1p_dist.figures import BLUE, GREY, INK, RULE, mean_of
from r1p_dist.files import lock_file, write_atomically
from r1p_dist.page import figure, number, page, table, text
from r1p_dist.run_files import CONFIG_FILE, METRICS_FILE, REPORT_FILE
from r1p_dist.safe_yaml import read_yaml, write_yaml

SWEEP_FILE = "sweep.json"
BEST_FILE = "best.yaml"
_LOCK = ".table"  # points that end at the same time write the table one after the other
METRICS = ("last", "average", "transfer", "bwt", "forgetting")
_BEST = "last"
TEST = "test"


@dataclass(frozen=True)
class Row:
    """One point: what it varies, the split that it is evaluated on, its state, and its metrics where it has some."""

    name: str
    values: dict[str, str]
    split: str
    state: str
    job: str | None
    error: str | None
    metrics: dict[str, Any]

    @property
    def best_metric(self) -> float | None:
        return self.metrics.get(_BEST) if self.state == "finished" else None

    @property
    def means(self) -> list[float]:
        """Accuracy over all tasks, before and after each task."""
        return means_of(self.metrics)


def write_sweep_file(
    folder: Path, points: dict[str, dict[str, str]], refused: dict[str, str], splits: dict[str, str]
) -> None:
    """Notes the points of a sweep and those that cannot be trained, beside those noted before.

    splits: which split the others are evaluated on.
    """
    with lock_file(folder / _LOCK):
        content = _read(folder) if (folder / SWEEP_FILE).is_file() else {"points": {}, "refused": {}}
        content["splits"] = content.get("splits", {}) | splits
        content["points"] |= points
        content["refused"] = {name: why for name, why in content["refused"].items() if name not in points} | refused
        write_atomically(folder / SWEEP_FILE, json.dumps(content, indent=1) + "\n")


def noted_points(folder: Path) -> dict[str, dict[str, str]]:
    """Returns key -> value of each point that the sweep in a folder has by now; nothing where none began there."""
    return _read(folder)["points"] if (folder / SWEEP_FILE).is_file() else {}


def pruned_points(folder: Path) -> dict[str, int]:
    """Returns after how many tasks each point that fell behind was told to end."""
    return _read(folder).get("pruned", {})


def note_pruned(folder: Path, name: str, tasks: int) -> None:
    """Notes that a point fell behind after so many tasks."""
    with lock_file(folder / _LOCK):
        content = _read(folder)
        content["pruned"] = content.get("pruned", {}) | {name: tasks}
        write_atomically(folder / SWEEP_FILE, json.dumps(content, indent=1) + "\n")


def write_best(folder: Path, best: Row) -> Path:
    """Writes FOLDER/best.yaml, a recipe with the values of the best point, and returns its path."""
    tree = read_yaml(folder / best.name / CONFIG_FILE)
    del tree["run_dir"]
    del tree["data"]["evaluate_on"]  # what was chosen on one split is to be measured on another
    path = folder / BEST_FILE
    write_atomically(
        path, f"# The best of {folder.name} by Last, on {split_in_words(best.split)}: {best.name}\n{write_yaml(tree)}"
    )
    return path


def write_sweep_table(folder: Path, ask_cluster: bool = False) -> list[Row]:
    """Writes FOLDER/sweep.csv and FOLDER/report.html for what there is by now, and returns its rows.

    ask_cluster: whether to ask what became of the jobs; a job that writes the table itself does not.
    """
    with lock_file(folder / _LOCK):
        content = _read(folder)
        run_dirs = [folder / name for name in content["points"]]
        states = describe_runs(run_dirs) if ask_cluster else [describe_without_cluster(path) for path in run_dirs]
        rows = [
            _row(name, values, content, state)
            for (name, values), state in zip(content["points"].items(), states, strict=True)
        ]
        write_atomically(folder / "sweep.csv", _csv(rows))
        write_atomically(folder / REPORT_FILE, _page(folder, rows))
    return rows


def best_of(rows: Sequence[Row]) -> Row | None:
    """Returns the finished point with the highest Last; None where no point has one."""
    return max((row for row in rows if row.best_metric is not None), key=lambda row: row.best_metric, default=None)


def split_in_words(split: str) -> str:
    """Returns how a table names the split that something is chosen on."""
    return f"the {split} split" + (": it is no measure of the chosen any more" if split == TEST else "")


def _row(name: str, values: dict[str, str], content: dict[str, Any], run: RunState) -> Row:
    split, refused = content.get("splits", {}).get(name, TEST), content["refused"].get(name)
    if refused is not None:
        return Row(name, values, split, "refused", None, refused, {})
    tasks = content.get("pruned", {}).get(name)
    state = run.state if tasks is None else f"pruned after {tasks}"
    return Row(name, values, split, state, run.job and run.job.job_id, run.error, metrics_of(run.run_dir))


def means_of(metrics: dict[str, Any]) -> list[float]:
    """Returns the mean score over all tasks, before and after each task, of what metrics.json says."""
    return [mean for row in metrics.get("accuracy", []) if (mean := mean_of(row)) is not None]


def metrics_of(run_dir: Path) -> dict[str, Any]:
    """Returns what metrics.json of a run says by now; nothing where there is none."""
    try:
        return json.loads((run_dir / METRICS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
        if isinstance(content["points"], dict) and isinstance(content["refused"], dict):
            return content
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise InputError(f"{folder / SWEEP_FILE}: not there or not the file of a sweep; run the sweep's command")


def _keys(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.values))


def _csv(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    keys, measured = _keys(rows), [*METRICS, "wall_seconds"]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["point", *keys, "split", "state", "job", *measured, "error"])
    for row in rows:
        values, found = map(row.values.get, keys), map(row.metrics.get, measured)
        writer.writerow([row.name, *values, row.split, row.state, row.job, *found, row.error])
    return buffer.getvalue()


def _page(folder: Path, rows: Sequence[Row]) -> str:
    finished = [row for row in rows if row.best_metric is not None]
    best = best_of(rows)
    title = f"Sweep {folder.name}: {len(finished)} of {len(rows)} points finished"
    sections = [f"<h1>{text(title)}</h1>"]
    if best is not None:
        setting = ", ".join(f"{key}={value}" for key, value in best.values.items())
        where = split_in_words(best.split)
        sections.append(
            f"<p>Best by Last: <b>{text(setting)}</b>, {number(best.best_metric)} percent on {text(where)}.</p>"
        )
    sections += [_points_section(rows), _parameters_section(finished, _keys(rows)), _curves_section(finished, best)]
    return page(title, sections)


def _points_section(rows: Sequence[Row]) -> str:
    keys = _keys(rows)
    ordered = sorted(rows, key=lambda row: (row.best_metric is None, -(row.best_metric or 0)))
    lines = []
    for row in ordered:
        values, found = [row.values.get(key, "") for key in keys], [number(row.metrics.get(key)) for key in METRICS]
        lines.append([*values, row.split, row.state, *found, row.error or ""])
    columns = range(len(keys) + 2, len(keys) + 2 + len(METRICS))
    header = [*keys, "split", "state", *METRICS, ""]
    return "<h2>Points</h2>\n" + table(header, lines, numbers=set(columns), meaning=len(header) - 1)


def _parameters_section(finished: Sequence[Row], keys: Sequence[str]) -> str:
    """One plot per parameter that has several values: every point, and the mean over the points of a value."""
    shown = [key for key in keys if len({row.values.get(key) for row in finished}) > 1]
    if not shown:
        return ""
    drawing = Figure(figsize=(3.2 * len(shown), 2.8), layout="constrained")
    for axes, key in zip(drawing.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        rows = [row for row in finished if key in row.values]
        labels = sorted({row.values[key] for row in rows}, key=_order)
        is_number = all(_is_number(label) for label in labels)
        place = {label: float(label) if is_number else at for at, label in enumerate(labels)}
        axes.plot([place[row.values[key]] for row in rows], [row.best_metric for row in rows], ".", color=GREY)
        means = [mean_of(row.best_metric for row in rows if row.values[key] == label) for label in labels]
        axes.plot([place[label] for label in labels], means, "-o" if is_number else "o", color=BLUE)
        if not is_number:
            axes.set_xticks(list(place.values()), labels, rotation=30, ha="right")
        elif min(place.values()) > 0 and max(place.values()) >= 50 * min(place.values()):
            axes.set_xscale("log")
        axes.set_xlabel(key, color=INK)
        axes.set_ylabel("Last, percent", color=INK)
        axes.grid(color=RULE, linewidth=0.5)
    caption = "Last by the value of each parameter. Grey: the points; blue: their mean, over all values of the others."
    return "<h2>Parameters</h2>\n" + figure(drawing, "Last by parameter value", caption)


def _curves_section(finished: Sequence[Row], best: Row | None) -> str:
    rows = [row for row in finished if len(row.means) > 1]
    if not rows:
        return ""
    drawing = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = drawing.subplots()
    for row in sorted(rows, key=lambda row: row is best):  # the best one last, on top
        look = {"color": BLUE, "linewidth": 2, "marker": "."} if row is best else {"color": RULE, "linewidth": 1}
        axes.plot(row.means, **look)
    axes.set_xlabel("tasks trained", color=INK)
    axes.set_ylabel("accuracy, percent", color=INK)
    caption = "Mean accuracy over all tasks as the stream goes on, a line per point; blue: the best one."
    return "<h2>Curves</h2>\n" + figure(drawing, "mean accuracy after each task", caption)


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def _order(label: str) -> tuple[bool, float, str]:
    return (not _is_number(label), float(label) if _is_number(label) else 0.0, label)
