"""What a page is made of. The template has a macro for each kind; every text is escaped there."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import quote


class Link(NamedTuple):
    """A cell that leads to a file beside the page. href: relative, with what an address may not hold quoted."""

    text: str
    href: str


Cell = str | Link


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` between backticks."""

    kind: ClassVar = "text"
    text: str


@dataclass(frozen=True)
class Points:
    """A list of short texts, as in `Text`."""

    kind: ClassVar = "points"
    points: Sequence[str]


@dataclass(frozen=True)
class Code:
    """A file's text behind a summary that opens it."""

    kind: ClassVar = "code"
    summary: str
    text: str


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its head.

    numbers: the columns set to the right; meaning: the column of explanations.
    """

    kind: ClassVar = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: frozenset[int] = frozenset()
    meaning: int | None = None
    caption: str = ""


@dataclass(frozen=True)
class HeatCell:
    """A shaded cell. other: its text in the other of two views. shade: -1 (worst) to 1 (best), None without colour."""

    text: str
    other: str = ""
    shade: float | None = None
    title: str = ""
    is_framed: bool = False


@dataclass(frozen=True)
class Heat:
    """A table whose colours say more than its numbers.

    views: the names of what `text` and `other` of the cells show; one name where there is no other. alt: what the
    table is, for those who hear it.
    """

    kind: ClassVar = "heat"
    alt: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[HeatCell]]]
    views: tuple[str, ...]
    caption: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure as Plotly's `data` and `layout`, with the table of what it shows.

    Colours are CSS variables, `var(--blue)`, so that they follow the page from light to dark. height: in pixels.
    """

    kind: ClassVar = "chart"
    title: str
    data: Sequence[dict[str, Any]]
    layout: dict[str, Any]
    height: int
    caption: str = ""
    table: Table | None = None


@dataclass(frozen=True)
class Columns:
    """Parts side by side where there is room. is_wide: they need more of it than a figure does."""

    kind: ClassVar = "columns"
    parts: Sequence["Part"]
    is_wide: bool = False


@dataclass(frozen=True)
class Picture:
    """A JPEG with lines of text below it."""

    jpeg: bytes
    alt: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side."""

    kind: ClassVar = "gallery"
    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Fold:
    """Parts behind a summary that opens them."""

    kind: ClassVar = "fold"
    summary: str
    parts: Sequence["Part"]


Part = Text | Points | Code | Table | Heat | Chart | Columns | Gallery | Fold


@dataclass(frozen=True)
class Section:
    """A part of a page with its heading, left out where it is empty."""

    title: str
    parts: Sequence[Part] = ()


class Tile(NamedTuple):
    """A number at the head of a page."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A page. lead: the sentence that says it all; facts: short remarks below it."""

    title: str
    lead: str = ""
    facts: Sequence[str] = ()
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = field(default_factory=list)


def linked(text: str, folder: Path, place: str) -> Cell:
    """Return a cell that leads to a file, PLACE in the page's folder, where it is there; else the text."""
    return Link(text, quote(place)) if (folder / place).is_file() else text


def number(value: float | None, signed: bool = False) -> str:
    """Return the number with one decimal, a dash for None."""
    if value is None:
        return "–"
    # Adding 0.0 turns the -0.0 that rounding leaves into 0.0.
    return f"{round(value, 1) + 0.0:{'+' if signed else ''}.1f}"


def shortened(name: str, most: int = 28) -> str:
    """Return the name, cut where it is longer than `most` letters."""
    return name if len(name) <= most else name[: most - 1] + "…"
