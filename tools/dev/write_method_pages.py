"""Write docs/methods: a list of the shipped methods and a page for each, from what its class says of itself.

Rows come from docs/comparison*.json. choosing.md there is written by hand, nothing else is.
"""

import argparse
import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from r1p_dist.evaluation.comparison import COLUMNS, Figures, Table, cell
from r1p_dist.method_list import Description, describe_all

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs/methods"
BY_HAND = "choosing.md"
_SOURCE = "<!-- made by tools/dev/write_method_pages.py -->\n"
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")


def main() -> None:
    """Write the pages and remove those of methods that are no more."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    made = pages()
    PAGES.mkdir(exist_ok=True)
    for path in PAGES.glob("*.md"):
        if path.name not in (BY_HAND, *made):
            path.unlink()
    for name, text in made.items():
        (PAGES / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Return the text of each page by its name."""
    shipped = [description for description in describe_all() if description.module.startswith("r1p_dist.")]
    comparisons = {path.name: json.loads(path.read_text("utf-8")) for path in (ROOT / "docs").glob("comparison*.json")}
    made = {f"{description.name}.md": _page(description, comparisons) for description in shipped}
    return {"README.md": _list(shipped), **made}


def _list(shipped: Sequence[Description]) -> str:
    rows = [
        [
            f"[{method.name}]({method.name}.md)",
            _ARXIV.sub("", method.summary).replace(" ()", ""),
            _paper(method),
            method.stores,
            method.inference_needs,
        ]
        for method in shipped
    ]
    return (
        f"{_SOURCE}# Methods\n\n"
        "`method=NAME` in a recipe or on the command line names one, `options.KEY` sets what that one alone reads.\n"
        "[choosing.md](choosing.md) helps to choose by what a method needs, and how to add one is in\n"
        "[add_a_method.md](../add_a_method.md).\n\n"
        + _table(["Method", "In short", "Paper", "Stores from task to task", "Inference needs"], rows)
    )


def _page(method: Description, comparisons: Mapping[str, dict[str, Any]]) -> str:
    file = f"r1p_dist/methods/{method.name}.py"
    test = f"tests/methods/test_{method.name}.py"
    facts = [
        ["Paper", _paper(method)],
        ["Stores from task to task", method.stores],
        ["Inference needs", method.inference_needs],
        ["Code", f"[{file}](../../{file})"],
        *([["Test of its formulae", f"[{test}](../../{test})"]] if (ROOT / test).is_file() else []),
    ]
    parts = [f"{_SOURCE}# {method.name}", method.docstring, _table(["", ""], facts).rstrip()]
    layers = dict(_layers(ROOT / file))
    if layers:
        parts += ["## Its layer", *(f"`{name}`: {text}" for name, text in layers.items())]
    parts.append("## Options")
    options = [[f"`options.{option.name}`", f"`{option.default}`", option.meaning] for option in method.options]
    parts.append(_table(["Option", "Default", "Meaning"], options).rstrip() if options else "None.")
    parts.append("## In comparison")
    parts += _results(method.name, comparisons) or ["Not compared here yet."]
    return "\n\n".join(parts) + "\n"


def _paper(method: Description) -> str:
    return _ARXIV.sub(r"[\g<0>](https://arxiv.org/abs/\1)", method.paper) or "–"


def _layers(path: Path) -> Iterator[tuple[str, str]]:
    """Yield name and docstring of the layers that a method's file defines."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and any(
            ast.unparse(base).endswith(("Linear", "nn.Module")) for base in node.bases
        ):
            yield node.name, ast.get_docstring(node) or ""


def _results(name: str, comparisons: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return a table of the method's rows of each comparison that has any, after a line on it."""
    parts = []
    for file, data in sorted(comparisons.items()):
        labels = [label for label, overrides in data["overrides"].items() if _method_of(label, overrides) == name]
        runs: dict[str, list[Figures]] = {}
        for key, figures in data["runs"].items():
            if (label := key.rpartition("-seed")[0]) in labels:
                runs.setdefault(label, []).append(figures)
        if not runs:
            continue
        shown = [
            key for key in COLUMNS if any(figures.get(key) is not None for own in runs.values() for figures in own)
        ]
        rows = [[label, *(_cell(own, key) for key in shown), str(len(own))] for label, own in runs.items()]
        # what all labels got is no label's own
        shared = [
            item
            for item in next(iter(data["overrides"].values()))
            if all(item in own for own in data["overrides"].values())
        ]
        recipe = " ".join([data["recipe"], *(f"`{item}`" for item in shared)])
        parts.append(
            f"Recipe {recipe}, mean ± sample standard deviation over the seeds; "
            f"[{file}](../{file}) has each run, and what a label got beside the recipe:"
        )
        parts.append(Table(["Label", *(COLUMNS[key] for key in shown), "Seeds"], rows).markdown().rstrip())
    return parts


def _cell(runs: Sequence[Figures], key: str) -> str:
    return cell([figures.get(key) for figures in runs], digits=2 if key == "recovered" else 1)


def _method_of(label: str, overrides: Sequence[str]) -> str:
    named = [item.partition("=")[2] for item in overrides if item.startswith("method=")]
    return named[-1] if named else label


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = [[text.replace("|", r"\|") for text in row] for row in rows]
    return Table(header, escaped, has_numbers=False).markdown()


if __name__ == "__main__":
    main()
