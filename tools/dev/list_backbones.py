"""Writes the list of open_clip's models into docs/backbones.md: what `r1p backbones` says, of all of them.

    python tools/dev/list_backbones.py

Nothing is fetched: of a model whose text tower's configuration is on the hub, the list says so, whatever this machine
has a copy of. It takes a minute.
"""

import argparse
import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"
BEGIN, END = "<!-- list -->\n", "<!-- end of list -->\n"
_CONFIGURATION = "text tower's configuration"


def versions() -> str:
    return f"open_clip {version('open_clip_torch')} and timm {version('timm')}"


def table(names: Iterable[str]) -> dict[str, str]:
    """Returns the row of each model."""
    from r1p_dist.kinds.open_clip.catalogue import Listed, describe

    def row(listed: Listed) -> str:
        hub = ", ".join(f"{part}: {place}" for part, place in listed.hub.items())
        counts = [str(listed.linears.get(tower, "none")) for tower in ("image", "text")]
        counts = ["?", "?"] if _CONFIGURATION in listed.hub else counts
        notes = [] if _CONFIGURATION in listed.hub else list(dict.fromkeys(listed.reasons.values()))
        notes += [hub] if hub else []
        return f"| {listed.name} | {' | '.join(counts)} | {listed.loss} | {'; '.join(notes)} |"

    return {listed.name: row(listed) for listed in describe(names)}


def text(rows: dict[str, str]) -> str:
    """Returns the list as the page has it."""
    cells = {name: [cell.strip() for cell in row.split("|")[2:4]] for name, row in rows.items()}
    known = {name: pair for name, pair in cells.items() if "?" not in pair}
    both = [name for name, pair in known.items() if "none" not in pair]
    some = [name for name, pair in known.items() if pair.count("none") == 1]
    lines = [
        f"Of {len(rows)} models of {versions()}, adapters go on both towers of {len(both)}, on one tower of "
        f"{len(some)}, on none of {len(known) - len(both) - len(some)}; {len(rows) - len(known)} have a text tower "
        "whose configuration is on the hub, so its shapes are not known here.",
        "",
        "| Model | Linears, image | Linears, text | Loss | Why not; from the hub |",
        "| --- | ---: | ---: | --- | --- |",
        *rows.values(),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from r1p_dist.kinds.open_clip.catalogue import names

    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text(table(names()))}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
