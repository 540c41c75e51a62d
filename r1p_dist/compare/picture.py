"""The picture of a comparison: where each method ends, and what it forgets."""

from collections.abc import Mapping
from statistics import fmean

from matplotlib.figure import Figure

from r1p_dist.evaluation.comparison import COLUMNS, JOINT, ZERO_SHOT, Figures, Key, runs_of
from r1p_dist.figures import BLUE, GREEN, GREY, INK, ORANGE, RULE

CAPTION = (
    "A row is a method, a dot a seed, a bar their mean. Left: Last, by which they are sorted, with zero-shot and joint "
    "training as lines. Right: what was forgotten."
)
_LINES = {ZERO_SHOT: ("zero-shot", GREY), JOINT: ("joint training", GREEN)}


def methods_figure(figures: Mapping[Key, Figures], unit: str) -> Figure | None:
    """Draw Last and forgetting of each method, the best on top; zero-shot and joint training are lines.

    unit: of the figures. None when there is no method to draw.
    """
    names = list(dict.fromkeys(label for label, _ in figures))
    means = {name: fmean(values) for name in names if (values := _known(name, figures, "last"))}
    rows = sorted((name for name in means if name not in _LINES), key=means.__getitem__)
    if not rows:
        return None
    drawing = Figure(figsize=(8.4, 1.2 + 0.28 * len(rows)), layout="constrained")
    panels = drawing.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for axes, name_of_figure, colour, counts in zip(
        panels, ("last", "forgetting"), (BLUE, ORANGE), (unit, "points"), strict=True
    ):
        for y, name in enumerate(rows):
            if values := _known(name, figures, name_of_figure):
                axes.plot(values, [y] * len(values), ".", color=colour, markersize=7)
                axes.plot([fmean(values)], [y], "|", color=colour, markersize=12, markeredgewidth=2)
        axes.set_xlabel(f"{COLUMNS[name_of_figure]}, {counts}", color=INK, fontsize=9)
        axes.grid(color=RULE, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=9)
        axes.spines[:].set_visible(False)
    for name, (label, colour) in _LINES.items():
        if name in means:
            panels[0].axvline(means[name], color=colour, linewidth=1.2, linestyle="--", label=label)
    panels[0].set_yticks(range(len(rows)), [name.replace("$", r"\$") for name in rows])
    panels[0].set_ylim(-0.6, len(rows) - 0.4)
    if panels[0].get_legend_handles_labels()[0]:
        look = {"frameon": False, "fontsize": 9, "borderaxespad": 0.2}
        panels[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, **look)
    return drawing


def _known(label: str, figures: Mapping[Key, Figures], name: str) -> list[float]:
    return [value for run in runs_of(label, figures) if (value := run[name]) is not None]
