"""The files of a comparison beside its Markdown page: a table for spreadsheets, a page for browsers, a picture."""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1p_dist.compare import costs
from r1p_dist.compare.pages import Comparison, Section, markdown_page
from r1p_dist.compare.picture import CAPTION, methods_figure
from r1p_dist.evaluation.comparison import COLUMNS
from r1p_dist.figures import png_of
from r1p_dist.files import lock_file, write_atomically
from r1p_dist.page import image, page, table, text


def write_files(folder: Path, contents: Mapping[str, str | bytes]) -> None:
    """Writes the files by their names; where several processes do, one after the other."""
    with lock_file(folder / ".table"):
        for name, content in contents.items():
            write_atomically(folder / name, content)


def page_files(name: str, sections: Sequence[Section], data: Mapping[str, Any]) -> dict[str, str | bytes]:
    """Return NAME.md and NAME.json."""
    return {f"{name}.md": markdown_page(sections), f"{name}.json": json.dumps(data, indent=1) + "\n"}


def further_files(title: str, found: Comparison) -> dict[str, str | bytes]:
    """Return comparison.csv, comparison.html and, where there is a method to draw, comparison.png."""
    drawing = methods_figure(found.figures, found.unit)
    parts = [f"<h1>{text(title)}</h1>", *map(_html, found.sections)]
    files: dict[str, str | bytes] = {"comparison.csv": _csv(found)}
    if drawing is not None:
        png = png_of(drawing)
        parts.insert(1, image(png, drawing.get_figwidth(), "Last and forgetting of each method", CAPTION))
        files["comparison.png"] = png
    return files | {"comparison.html": page(title, parts)}


def _csv(found: Comparison) -> str:
    """Return a row per run, with numbers as they are and nothing where there is none."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["label", "seed", *COLUMNS, *costs.COLUMNS])
    for (label, seed), figures in found.figures.items():
        spent = found.costs[label, seed]
        writer.writerow([label, seed, *map(figures.get, COLUMNS), *map(spent.get, costs.COLUMNS)])
    return buffer.getvalue()


def _html(section: Section) -> str:
    parts = [f"<h2>{text(section.title)}</h2>" if section.title else ""]
    if section.table is not None:
        parts.append(table(section.table.header, section.table.rows, {*range(1, len(section.table.header))}))
    parts.append(f"<p>{_inline(section.note)}</p>" if section.note else "")
    if section.points:
        parts.append("<ul>" + "".join(f"<li>{_inline(point)}</li>" for point in section.points) + "</ul>")
    return "\n".join(part for part in parts if part)


def _inline(markdown: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(markdown))
