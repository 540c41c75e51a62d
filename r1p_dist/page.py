"""Pieces of a self-contained HTML page: style, tables, figures as PNGs inside it."""

import base64
import html
from collections.abc import Sequence

from matplotlib.figure import Figure

from r1p_dist.figures import png_of

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { max-width: 46rem; } p.facts, figcaption, td.meaning { color: #555; } figure { margin: 0; }
figcaption { font-size: .9rem; max-width: 46rem; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; } th, td { padding: .22rem .9rem .22rem 0; text-align: left; }
th { border-bottom: 1px solid #999; font-weight: 600; } td { border-bottom: 1px solid #e4e4e4; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


def page(title: str, sections: Sequence[str]) -> str:
    """Return the whole page; a section is HTML, an empty one is left out."""
    body = "\n".join(section for section in sections if section)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Return the value as text that HTML does not read as markup."""
    return html.escape(str(value))


def number(value: float | None, signed: bool = False) -> str:
    """Return the number with one decimal, a dash for None."""
    if value is None:
        return "–"
    # Adding 0.0 turns the -0.0 that rounding leaves into 0.0.
    return f"{round(value, 1) + 0.0:{'+' if signed else ''}.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: set[int], meaning: int | None = None) -> str:
    """Return a table of texts. numbers: the columns set to the right; meaning: the column of explanations."""

    def cell(tag: str, column: int, value: str) -> str:
        kind = "number" if column in numbers else "meaning" if column == meaning else ""
        attribute = f' class="{kind}"' if kind else ""
        return f"<{tag}{attribute}>{text(value)}</{tag}>"

    lines = ["".join(cell("th", i, value) for i, value in enumerate(header))]
    lines += ["".join(cell("td", i, value) for i, value in enumerate(row)) for row in rows]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def figure(drawing: Figure, alt: str, caption: str) -> str:
    """Return the figure with its caption."""
    return image(png_of(drawing), drawing.get_figwidth(), alt, caption)


def image(png: bytes, inches: float, alt: str, caption: str) -> str:
    """Return a picture with its caption. inches: its width."""
    width = round(inches * 96)
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img width="{width}" alt="{text(alt)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )
