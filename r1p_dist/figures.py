"""The score matrix as a picture, for documents that hold pictures, and how pictures are written.

Drawn without pyplot, so that no global state of a program that imports this is touched.
"""

import io
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from r1p_dist.evaluation.score_matrix import ScoreMatrix, change_from, mean_of

INK, RULE, MISSING = "#1b1b1b", "#CCCCCC", "#EEEEEE"
CHANGE_COLOURS = colormaps["RdBu"]


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
            _draw_cell(axes, c, tops[r], value, colour, is_own=matrix.is_own(r, c))
        _draw_cell(axes, tasks + gap, tops[r], mean_of(row), "white", is_own=False)
    names = [_plain(name) for name in matrix.tasks]
    columns = [
        name if metric == "accuracy" else f"{name} ({_plain(metric)})"
        for name, metric in zip(names, matrix.task_metrics, strict=True)
    ]
    axes.set_xticks([*(c + 0.5 for c in range(tasks)), tasks + gap + 0.5], [*columns, "mean"])
    axes.set_yticks([top + 0.5 for top in tops], [_plain(moment, 30) for moment in matrix.moments])
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


def _plain(name: str, most: int = 24) -> str:
    """The name shortened, and with `$` escaped, which would start a formula in matplotlib."""
    return (name if len(name) <= most else name[: most - 1] + "…").replace("$", r"\$")
