"""From a page's parts to one HTML file that opens anywhere, by Jinja2, with Plotly's figures.

The file loads nothing: a policy in its head forbids that. Plotly's library lies in it compressed, two of its five
megabytes, and is read from the installed package without importing that.
"""

import base64
import gzip
import importlib.util
import json
import re
from functools import cache, partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from r1p_dist.data.stream import ASSETS
from r1p_dist.page.parts import Chart, Columns, Fold, Link, Page, Part

LIBRARY = "package_data/plotly.min.js"
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'"
)


def render_page(page: Page, refresh_s: float | None = None) -> str:
    """Return the whole page. refresh_s: how often it asks its server for a newer one; None: it is a file."""
    library = _library() if any(_has_chart(section.parts) for section in page.sections) or refresh_s else ""
    return _template("page.html").render(page=page, library=library, refresh_s=refresh_s, policy=POLICY)


def render_main(page: Page) -> str:
    """Return what changes of a page that is looked at while its run goes on."""
    return _template("main.html").render(page=page)


@cache
def _template(name: str):
    folder = ASSETS / "report"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"inline": _inline, "spec": _spec, "picture": _picture, "cell": _cell, "slug": _slug}
    read = partial(Path.read_text, encoding="utf-8")
    environment.globals |= {"style": Markup(read(folder / "page.css")), "program": Markup(read(folder / "page.js"))}
    return environment.get_template(name)


@cache
def _library() -> str:
    """Return Plotly's library, compressed, in base64."""
    package = importlib.util.find_spec("plotly")
    (folder,) = package.submodule_search_locations
    return base64.b64encode(gzip.compress((Path(folder) / LIBRARY).read_bytes(), 6, mtime=0)).decode("ascii")


def _has_chart(parts: list[Part] | tuple[Part, ...]) -> bool:
    return any(
        isinstance(part, Chart) or (isinstance(part, Columns | Fold) and _has_chart(part.parts)) for part in parts
    )


def _inline(text: str) -> Markup:
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _spec(chart: Chart) -> Markup:
    """Return a chart as JSON that no HTML parser reads as anything else."""
    text = json.dumps({"data": chart.data, "layout": {**chart.layout, "height": chart.height}}, allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _picture(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode('ascii')}"


def _cell(cell: str | Link) -> Markup:
    text = escape(cell.text if isinstance(cell, Link) else cell).replace("_", Markup("_<wbr>"))
    return Markup('<a href="{}">{}</a>').format(cell.href, text) if isinstance(cell, Link) else text


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
