"""The files of a comparison beside its Markdown page: a table for spreadsheets, a page for browsers."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1p_dist.compare import costs
from r1p_dist.compare.charts import charts, last_means
from r1p_dist.compare.pages import Comparison, Section, markdown_page
from r1p_dist.evaluation.comparison import COLUMNS, JOINT, PAIRED, ZERO_SHOT, cell
from r1p_dist.files import lock_file, write_atomically
from r1p_dist.page.parts import Page, Part, Points, Table, Text, linked
from r1p_dist.page.parts import Section as PageSection
from r1p_dist.page.render import render_page
from r1p_dist.run_files import REPORT_FILE


def write_files(folder: Path, contents: Mapping[str, str | bytes]) -> None:
    """Writes the files by their names; where several processes do, one after the other."""
    with lock_file(folder / ".table"):
        for name, content in contents.items():
            write_atomically(folder / name, content)


def page_files(name: str, sections: Sequence[Section], data: Mapping[str, Any]) -> dict[str, str | bytes]:
    """Return NAME.md and NAME.json."""
    return {f"{name}.md": markdown_page(sections), f"{name}.json": json.dumps(data, indent=1) + "\n"}


def further_files(title: str, folder: Path, found: Comparison) -> dict[str, str | bytes]:
    """Return comparison.csv and comparison.html. folder: that of the runs, whose reports are linked."""
    sections = [PageSection("Figures", charts(found.figures, found.costs, found.unit))]
    sections += [PageSection(section.title, _parts(section)) for section in found.sections]
    sections.append(PageSection("Runs", _runs(folder, found)))
    page = Page(title, _lead(found), sections=sections)
    return {"comparison.csv": _csv(found), "comparison.html": render_page(page)}


def _lead(found: Comparison) -> str:
    """Return which method ends highest; nothing where none has ended."""
    means = last_means(found.figures)
    ranked = sorted((label for label in means if label not in (ZERO_SHOT, JOINT)), key=means.__getitem__, reverse=True)
    if not ranked:
        return ""
    bounds = [f"{name} at {means[name]:.1f}" for name in (ZERO_SHOT, JOINT) if name in means]
    against = f", with {' and '.join(bounds)}" if bounds else ""
    return f"{ranked[0]} ends highest of {len(ranked)} methods: Last is {means[ranked[0]]:.1f} {found.unit}{against}."


def _runs(folder: Path, found: Comparison) -> list[Part]:
    rows = []
    for label, seed in sorted(found.figures):
        name = linked(f"{label}, seed {seed}", folder, f"{label}-seed{seed}/{REPORT_FILE}")
        rows.append([name, *(cell([found.figures[label, seed][key]]) for key in PAIRED)])
    header = ["Run", *(COLUMNS[key] for key in PAIRED)]
    return [Table(header, rows, frozenset(range(1, len(header))))] if rows else []


def _csv(found: Comparison) -> str:
    """Return a row per run, with numbers as they are and nothing where there is none."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["label", "seed", *COLUMNS, *costs.COLUMNS])
    for (label, seed), figures in found.figures.items():
        spent = found.costs[label, seed]
        writer.writerow([label, seed, *map(figures.get, COLUMNS), *map(spent.get, costs.COLUMNS)])
    return buffer.getvalue()


def _parts(section: Section) -> list[Part]:
    parts: list[Part] = []
    if section.table is not None:
        header = section.table.header
        parts.append(Table(header, section.table.rows, frozenset(range(1, len(header)))))
    parts += [Text(section.note)] if section.note else []
    return [*parts, Points(section.points)] if section.points else parts
