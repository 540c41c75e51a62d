"""The figures of a run: score matrix, scores around each merge, training curves.

Drawn without pyplot, so that no global state of a program that imports this is touched.
"""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from r1p_dist.evaluation.answers import SCALE

# Okabe and Ito's palette: told apart with every kind of colour blindness, and in grey by their lightness.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#767676"
INK, RULE, MISSING = "#1b1b1b", "#CCCCCC", "#EEEEEE"
CHANGE_COLOURS = colormaps["RdBu"]

Row = list[float | None]


@dataclass(frozen=True)
class ScoreMatrix:
    """Rows of a metrics.json, each as long as there are tasks; None where not evaluated.

    task_metrics: the metric of each task, `accuracy` for classification.
    """

    tasks: list[str]
    task_metrics: list[str]
    zero_shot: Row
    trained: list[Row]
    is_joint: bool

    @classmethod
    def read(cls, metrics: dict[str, Any], key: str = "accuracy") -> "ScoreMatrix":
        """Return the rows under `key`: `accuracy`, the scores by each task's metric, or `instruction_following`."""
        tasks = [str(name) for name in metrics["tasks"]]
        task_metrics = [str(name or "accuracy") for name in pad_row(metrics.get("metric"), len(tasks))]
        rows = [pad_row(row, len(tasks)) for row in metrics[key]] or [pad_row(None, len(tasks))]
        while len(rows) > 1 and all(value is None for value in rows[-1]):
            rows.pop()
        # After the first of several tasks `last` is not defined yet; after training all at once it is.
        is_joint = len(rows) == 2 and len(tasks) > 1 and metrics.get("last") is not None
        return cls(tasks, task_metrics, rows[0], rows[1:], is_joint)

    @property
    def quantity(self) -> str:
        """What the values of all tasks are: accuracy, or else scores."""
        return "accuracy" if {*self.task_metrics} <= {"accuracy"} else "score"

    @property
    def scales(self) -> list[str]:
        """The metric of each task with the scale of its values: `accuracy, percent`."""
        return [f"{metric}, {SCALE.get(metric, 'percent')}" for metric in self.task_metrics]

    @property
    def unit(self) -> str:
        """The unit of means over all tasks: percent, or points where a task has another scale."""
        return "percent" if {SCALE.get(metric, "percent") for metric in self.task_metrics} <= {"percent"} else "points"

    @property
    def own(self) -> Row:
        """The value of each task right after its own training and merge."""
        if self.is_joint:
            return self.trained[0]
        return [self.trained[i][i] if i < len(self.trained) else None for i in range(len(self.tasks))]

    @property
    def now(self) -> Row:
        """The last row there is, None throughout when nothing has been trained."""
        return self.trained[-1] if self.trained else [None] * len(self.tasks)


def pad_row(row: Sequence[Any] | None, tasks: int) -> list[Any]:
    """Return the row with exactly one value per task, None where there is none."""
    values = list(row or [])[:tasks]
    return values + [None] * (tasks - len(values))


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean, None when there are no values or one is missing."""
    known = list(values)
    return None if not known or any(value is None for value in known) else math.fsum(known) / len(known)


def change_from(reference: float | None, value: float | None) -> float | None:
    """Return value - reference, None when one is missing."""
    return None if value is None or reference is None else value - reference


def png_of(figure: Figure) -> bytes:
    """Return the figure as a PNG, at twice the density of an ordinary screen."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=192, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def matrix_figure(matrix: ScoreMatrix) -> Figure:
    """Draw the score matrix: numbers are the scores, colour is the change against zero-shot, own tasks are framed.

    A column of another metric than accuracy has its name.
    """
    tasks, rows = len(matrix.tasks), [matrix.zero_shot, *matrix.trained]
    changes = [change_from(*pair) for row in matrix.trained for pair in zip(matrix.zero_shot, row, strict=True)]
    # The ends of the colour map are too dark to print on.
    limit = 1.2 * max([1.0, *(abs(change) for change in changes if change is not None)])
    norm = TwoSlopeNorm(0.0, -limit, limit)
    # The zero-shot row and the column of means stand a part of a cell apart.
    gap = 0.35
    height, width = len(rows) + gap * bool(matrix.trained), tasks + gap + 1

    figure = Figure(figsize=(1.9 + 0.62 * width, 1.3 + 0.4 * height), layout="constrained")
    axes = figure.add_subplot()
    tops = [r + gap * bool(r) for r in range(len(rows))]
    for r, row in enumerate(rows):
        for c, value in enumerate(row):
            change = change_from(matrix.zero_shot[c], value)
            colour = MISSING if change is None else CHANGE_COLOURS(norm(change)) if r else "white"
            _draw_cell(axes, c, tops[r], value, colour, is_own=r > 0 and (c == r - 1 or matrix.is_joint))
        _draw_cell(axes, tasks + gap, tops[r], mean_of(row), "white", is_own=False)
    names = [_plain(name) for name in matrix.tasks]
    columns = [
        name if metric == "accuracy" else f"{name} ({_plain(metric)})"
        for name, metric in zip(names, matrix.task_metrics, strict=True)
    ]
    moments = ["after all, together"] if matrix.is_joint else [f"after {name}" for name in names]
    axes.set_xticks([*(c + 0.5 for c in range(tasks)), tasks + gap + 0.5], [*columns, "mean"])
    axes.set_yticks([top + 0.5 for top in tops], ["zero-shot", *moments][: len(rows)])
    axes.tick_params(length=0, labelsize=9)
    axes.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False)
    for tick in axes.get_xticklabels():
        tick.set(rotation=40, ha="left", va="bottom", rotation_mode="anchor")
    axes.set(xlim=(-0.05, width + 0.05), ylim=(height + 0.05, -0.05))
    axes.spines[:].set_visible(False)
    if matrix.trained:
        bar = figure.colorbar(ScalarMappable(norm, CHANGE_COLOURS), ax=axes, shrink=0.9, aspect=24, pad=0.015)
        bar.set_label("points against\nzero-shot", fontsize=9)
        bar.ax.tick_params(labelsize=8, length=2)
        bar.outline.set_visible(False)
    return figure


def _draw_cell(axes: Axes, x: float, y: float, value: float | None, colour: Any, is_own: bool) -> None:
    edge = INK if is_own else RULE if colour == "white" else "white"
    look = {"linewidth": 1.4 if is_own else 0.8, "zorder": 3 if is_own else 2}
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor=edge, **look))
    is_dark = not isinstance(colour, str) and 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.5
    number = "–" if value is None else f"{value:.1f}"
    look = {"fontsize": 8.5, "color": "white" if is_dark else INK, "zorder": 4}
    axes.text(x + 0.5, y + 0.52, number, ha="center", va="center", **look)


def merge_figure(matrix: ScoreMatrix, before_merge: Row) -> Figure:
    """Draw, per task, its score before any training, just before its merge and just after."""
    tasks = len(matrix.tasks)
    figure = Figure(figsize=(7.2, 0.9 + 0.3 * tasks), layout="constrained")
    axes = figure.add_subplot()
    for y, ends in enumerate(zip(before_merge, matrix.own, strict=True)):
        if None not in ends:
            axes.plot(ends, [y, y], color="#BBBBBB", linewidth=2, zorder=1, solid_capstyle="butt")
    looks = [
        ("zero-shot", matrix.zero_shot, {"marker": "|", "color": GREY, "s": 90, "linewidths": 1.6}),
        ("before the merge", before_merge, {"facecolors": "white", "edgecolors": ORANGE, "linewidths": 1.8}),
        ("after the merge", matrix.own, {"color": BLUE}),
    ]
    for label, values, look in looks:
        known = [y for y, value in enumerate(values) if value is not None]
        if known:
            axes.scatter([values[y] for y in known], known, label=label, zorder=2, **look)
    most = max([100.0, *(value for _, values, _ in looks for value in values if value is not None)])
    axes.set_yticks(range(tasks), [_plain(name) for name in matrix.tasks])
    axes.set(xlim=(-0.02 * most, 1.02 * most), ylim=(tasks - 0.5, -0.5), xlabel=f"{matrix.quantity} ({matrix.unit})")
    axes.grid(axis="x", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9, borderaxespad=0.2)
    return figure


def curves_figure(log: Sequence[dict[str, Any]]) -> Figure | None:
    """Draw the loss, its terms and the learning rate, whichever the log has, over the steps of the whole stream.

    log: records of log.jsonl; `step` counts within its task. None when there is nothing to draw.
    """
    log = [record for record in log if "task" in record and _is_finite(record.get("step"))]
    terms = dict.fromkeys(key for record in log for key in record if key.startswith("loss_"))
    named = [(key, f"loss: {_plain(key.removeprefix('loss_'))}", GREEN) for key in terms]
    curves = [("loss", "loss", BLUE), *named, ("lr", "learning rate", ORANGE)]
    curves = [curve for curve in curves if any(_is_finite(record.get(curve[0])) for record in log)]
    if not curves:
        return None
    records_of_task: dict[str, list[dict[str, Any]]] = {}
    for record in log:
        records_of_task.setdefault(str(record["task"]), []).append(record)

    figure = Figure(figsize=(9.4, 0.7 + 1.5 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    start = 0.0
    for task, records in records_of_task.items():
        steps = [record["step"] for record in records]
        for panel, (key, _, colour) in zip(panels, curves, strict=True):
            values = [record[key] if _is_finite(record.get(key)) else math.nan for record in records]
            # A single logged step would be a line without length.
            marker = "." if len(steps) == 1 else ""
            panel.plot([start + step for step in steps], values, color=colour, linewidth=1.2, marker=marker)
            if start:
                panel.axvline(start, color=RULE, linewidth=0.8)
        look = {"rotation": 30, "ha": "left", "va": "bottom", "rotation_mode": "anchor", "fontsize": 8.5}
        middle = start + max(steps) / 2
        panels[0].annotate(_plain(task), (middle, 1.02), xycoords=("data", "axes fraction"), **look)
        start += max(steps)
    for panel, (_, label, _) in zip(panels, curves, strict=True):
        panel.set_ylabel(label, fontsize=9)
        panel.grid(axis="y", color=MISSING, linewidth=0.8)
        panel.tick_params(labelsize=8, length=2)
        panel.yaxis.get_offset_text().set_fontsize(8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.ticklabel_format(axis="y", scilimits=(-3, 4))
    panels[-1].set_xlim(0, max(start, 1))
    panels[-1].set_xlabel("optimizer step of the stream", fontsize=9)
    return figure


def _plain(name: str) -> str:
    """The name shortened, and with `$` escaped, which would start a formula in matplotlib."""
    return (name if len(name) <= 24 else name[:23] + "…").replace("$", r"\$")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
