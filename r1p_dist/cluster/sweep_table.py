"""What a sweep has found so far: sweep.csv, and report.html with the best point and curves."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1p_dist.cluster.runs import RunState, describe_runs, describe_without_cluster
from r1p_dist.errors import InputError
from r1p_dist.evaluation.score_matrix import mean_of, means_of
from r1p_dist.files import lock_file, read_mapping, write_atomically
from r1p_dist.page.charts import COLOURS, axis, dots, layout, line, plain
from r1p_dist.page.parts import Chart, Columns, Page, Part, Section, Table, linked, number, shortened
from r1p_dist.page.render import render_page
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
        write_atomically(folder / REPORT_FILE, render_page(_page(folder, rows)))
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
    return Row(
        name, values, split, state, run.job and run.job.job_id, run.error, read_mapping(run.run_dir / METRICS_FILE)
    )


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


def _page(folder: Path, rows: Sequence[Row]) -> Page:
    finished = [row for row in rows if row.best_metric is not None]
    best = best_of(rows)
    title = f"Sweep {folder.name}: {len(finished)} of {len(rows)} points finished"
    lead = ""
    if best is not None:
        setting = ", ".join(f"{key}={value}" for key, value in best.values.items())
        lead = f"Best by Last: `{setting}`, {number(best.best_metric)} percent on {split_in_words(best.split)}."
    sections = [
        Section("Points", [_points(folder, rows)]),
        Section("Parameters", _parameters(finished, _keys(rows))),
        Section("Curves", _curves(finished, best)),
    ]
    return Page(title, lead, sections=sections)


def _points(folder: Path, rows: Sequence[Row]) -> Table:
    keys = _keys(rows)
    lines = []
    for row in sorted(rows, key=lambda row: (row.best_metric is None, -(row.best_metric or 0))):
        name = linked(row.name, folder, f"{row.name}/{REPORT_FILE}")
        values, found = [row.values.get(key, "") for key in keys], [number(row.metrics.get(key)) for key in METRICS]
        lines.append([name, *values, row.split, row.state, *found, row.error or ""])
    first = len(keys) + 3
    header = ["point", *keys, "split", "state", *METRICS, "error"]
    return Table(header, lines, frozenset(range(first, first + len(METRICS))), len(header) - 1)


def _parameters(finished: Sequence[Row], keys: Sequence[str]) -> list[Part]:
    """One figure per parameter that has several values: every point, and the mean over the points of a value."""
    shown = [key for key in keys if len({row.values.get(key) for row in finished}) > 1]
    return [Columns([_parameter(finished, key) for key in shown])] if shown else []


def _parameter(finished: Sequence[Row], key: str) -> Chart:
    rows = [row for row in finished if key in row.values]
    labels = sorted({row.values[key] for row in rows}, key=_order)
    is_number = all(_is_number(label) for label in labels)
    place = {label: float(label) if is_number else at for at, label in enumerate(labels)}
    means = [mean_of(row.best_metric for row in rows if row.values[key] == label) for label in labels]
    hover = [plain(row.name) for row in rows]
    look = {"text": hover, "hovertemplate": "%{text}: %{y:.1f}<extra></extra>"}
    points = dots(
        "points",
        [place[row.values[key]] for row in rows],
        [row.best_metric for row in rows],
        COLOURS[-1],
        "circle",
        **look,
    )
    points["marker"] |= {"size": 7, "line": {"width": 0}}
    mean = line(
        "their mean", list(place.values()), means, COLOURS[0], hovertemplate="%{x}: mean %{y:.1f}<extra></extra>"
    )
    mean["mode"] = "lines+markers" if is_number else "markers"
    scale = {"tickvals": list(place.values()), "ticktext": [plain(shortened(label)) for label in labels]}
    if is_number and min(place.values()) > 0 and max(place.values()) >= 50 * min(place.values()):
        scale |= {"type": "log"}
    title = f"Last by {key}"
    caption = "Grey: the points; blue: their mean, over all values of the others."
    values = Table(
        [key, "mean Last"], [[label, number(mean)] for label, mean in zip(labels, means, strict=True)], frozenset({1})
    )
    return Chart(title, [points, mean], layout(axis(plain(key), **scale), axis("Last, percent")), 280, caption, values)


def _curves(finished: Sequence[Row], best: Row | None) -> list[Part]:
    rows = [row for row in finished if len(row.means) > 1]
    if not rows:
        return []
    lines = []
    for row in sorted(rows, key=lambda row: row is best):  # the best one last, on top
        colour = COLOURS[0] if row is best else "var(--line)"
        hover = f"{plain(row.name)}, %{{x}} tasks: %{{y:.1f}}<extra></extra>"
        lines.append(line(row.name, list(range(len(row.means))), row.means, colour, hovertemplate=hover))
    caption = "Mean accuracy over all tasks as the stream goes on, a line per point; blue: the best one."
    look = layout(
        axis("tasks trained", dtick=max(1, max(len(row.means) for row in rows) // 12)), axis("accuracy, percent")
    )
    return [Chart("Mean accuracy after each task", lines, look, 360, caption)]


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def _order(label: str) -> tuple[bool, float, str]:
    return (not _is_number(label), float(label) if _is_number(label) else 0.0, label)
