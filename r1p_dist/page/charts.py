"""Figures of a page, as Plotly reads them: lines over steps, dots by name, bars.

Plotly reads tags in the texts of a figure: what comes from data goes through `plain` first.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = tuple(f"var(--{name})" for name in ("blue", "orange", "green", "purple", "red", "sky", "grey"))
MOST_POINTS = 1500  # of a line; more than a screen has columns
_CLEAR = "rgba(0,0,0,0)"


def plain(text: object) -> str:
    """Return a text as Plotly shows it letter by letter."""
    return html.escape(str(text), quote=False)


def is_finite(value: object) -> bool:
    """Whether a value of a log is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    """Return an axis with room for its labels."""
    return {
        "title": {"text": title, "standoff": 8},
        "gridcolor": "var(--grid)",
        "zeroline": False,
        "automargin": True,
        "ticks": "",
        **more,
    }


def layout(x: Mapping[str, Any], y: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return the look that all figures share."""
    return {
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--ink)"},
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "margin": {"l": 4, "r": 12, "t": 8, "b": 4},
        "colorway": list(COLOURS),
        "dragmode": False,  # a finger that scrolls the page would zoom
        "hoverlabel": {"bgcolor": "var(--soft)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)"}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": _CLEAR},
        "showlegend": False,
        "xaxis": dict(x),
        "yaxis": dict(y),
        **more,
    }


def line(name: str, x: Sequence[Any], y: Sequence[Any], colour: str, **more: Any) -> dict[str, Any]:
    """Return a line; a single point is a dot."""
    mode = "lines" if len([value for value in y if value is not None]) > 1 else "markers"
    look = {"line": {"color": colour, "width": 1.8}, "marker": {"color": colour}}
    return {"type": "scatter", "mode": mode, "name": name, "x": list(x), "y": list(y), **look, **more}


def dots(name: str, x: Sequence[Any], y: Sequence[Any], colour: str, symbol: str, **more: Any) -> dict[str, Any]:
    """Return dots. symbol: Plotly's name of it."""
    marker = {"color": colour, "symbol": symbol, "size": 10, "line": {"width": 2, "color": colour}}
    return {"type": "scatter", "mode": "markers", "name": name, "x": list(x), "y": list(y), "marker": marker, **more}


def thinned(records: Sequence[Any]) -> list[Any]:
    """Return every n-th record where there are more than a line can show, and the last one."""
    every = -(-len(records) // MOST_POINTS) or 1
    return [record for at, record in enumerate(records) if at % every == 0 or at == len(records) - 1]
