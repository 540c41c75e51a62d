"""The figures of a comparison: where each method ends, what it forgets, and what it costs."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from r1p_dist.compare.costs import COLUMNS as COST_COLUMNS
from r1p_dist.compare.costs import Costs
from r1p_dist.evaluation.comparison import COLUMNS, JOINT, ZERO_SHOT, Figures, Key, runs_of
from r1p_dist.page.charts import axis, dots, layout, line, plain
from r1p_dist.page.parts import Chart, Columns, Part, shortened

_LINES = {ZERO_SHOT: ("zero-shot", "var(--grey)"), JOINT: ("joint training", "var(--green)")}
_LOG_FROM = 20  # times the smallest: a cost that varies more is drawn by its logarithm


def charts(figures: Mapping[Key, Figures], costs: Mapping[Key, Costs], unit: str) -> list[Part]:
    """Return the figures, the best method on top; zero-shot and joint training are lines.

    unit: of the figures. Nothing where there is no method to draw.
    """
    means = last_means(figures)
    rows = sorted((name for name in means if name not in _LINES), key=means.__getitem__)
    if not rows:
        return []
    levels = {look: means[name] for name, look in _LINES.items() if name in means}
    caption = "A small dot is a seed, a bar their mean; zero-shot and joint training are lines."
    last = {name: known(runs_of(name, figures), "last") for name in rows}
    lost = {name: known(runs_of(name, figures), "forgetting") for name in rows}
    drawn = [
        _by_method(f"{COLUMNS['last']}, {unit}", "var(--blue)", last, levels, caption),
        _by_method(f"{COLUMNS['forgetting']}, points", "var(--orange)", lost, {}),
    ]
    for key in ("trained", "update_mb", "memory_mb", "minutes"):
        spent = {name: known(runs_of(name, costs), key) for name in rows}
        if any(value > 0 for values in spent.values() for value in values):
            drawn.append(_by_method(COST_COLUMNS[key], "var(--purple)", spent, {}, is_cost=True))
    return [Columns([chart for chart in drawn if chart is not None])]


def last_means(figures: Mapping[Key, Figures]) -> dict[str, float]:
    """Return the mean of Last over the seeds of each label that has it."""
    labels = dict.fromkeys(label for label, _ in figures)
    return {label: fmean(values) for label in labels if (values := known(runs_of(label, figures), "last"))}


def known(runs: Sequence[Mapping], name: str) -> list[float]:
    """Return the values of a figure over runs, without those that are not defined."""
    return [value for run in runs if (value := run[name]) is not None]


def _by_method(
    title: str,
    colour: str,
    values: Mapping[str, Sequence[float]],
    levels: Mapping[tuple[str, str], float],
    caption: str = "",
    is_cost: bool = False,
) -> Chart | None:
    """Return dots per method. levels: lines across, by name and colour. is_cost: small is good, and 0 is nothing."""
    names = [plain(shortened(name)) for name in values]
    kept = [[value for value in own if value > 0 or not is_cost] for own in values.values()]
    points = [(y, value) for y, own in enumerate(kept) for value in own]
    if not points:
        return None
    means = [(y, fmean(own)) for y, own in enumerate(kept) if own]
    smallest, largest = (choose(value for _, value in points) for choose in (min, max))
    if is_cost and largest > _LOG_FROM * smallest:
        scale = {"type": "log", "dtick": 1, "range": [math.log10(smallest) - 0.2, math.log10(largest) + 0.2]}
    else:
        ends = [smallest, largest, *levels.values()]
        margin = 0.06 * (max(ends) - min(ends)) or 0.1 * abs(largest) or 1.0
        scale = {"range": [min(ends) - margin, max(ends) + margin]}
    hover = "%{text}: %{x:,.4~g}<extra></extra>"
    seeds = dots("seeds", [v for _, v in points], [y for y, _ in points], colour, "circle", hovertemplate=hover)
    seeds["marker"] |= {"size": 6, "opacity": 0.6, "line": {"width": 0}}
    middle = dots("mean", [v for _, v in means], [y for y, _ in means], colour, "line-ns-open", hovertemplate=hover)
    middle["marker"] |= {"size": 15}
    for trace in (seeds, middle):
        trace["text"] = [f"{names[y]}, {trace['name']}" for y in trace["y"]]
    across = [
        line(name, [at, at], [-0.6, len(names) - 0.4], tint, hovertemplate=f"{name}: {at:.1f}<extra></extra>")
        | {"line": {"color": tint, "width": 1.5, "dash": "dash"}}
        for (name, tint), at in levels.items()
    ]
    seeds["showlegend"] = middle["showlegend"] = False
    look = layout(
        axis(**scale),
        axis(tickvals=list(range(len(names))), ticktext=names, range=[-0.6, len(names) - 0.4], showgrid=False),
        showlegend=bool(across),
    )
    return Chart(title, [*across, seeds, middle], look, 90 + 24 * len(names), caption)
