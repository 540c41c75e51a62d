"""Write docs/configuration.md: every key of a configuration with its default and what it means."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r1p_dist.config_reference import Key, Section

PAGE = Path(__file__).resolve().parents[2] / "docs/configuration.md"
_HEAD = """<!-- made by tools/dev/write_configuration_page.py -->
# Configuration

A recipe is a YAML file with these keys, `base: OTHER` to begin from another recipe, and nothing else; `key.sub=value`
on the command line is laid over it. `--print-config` shows what a run would have, `r1p config [KEY]` prints this page.
What stands in [launchers/recipes](../launchers/recipes) can be named without its path. Numbers are written as in YAML
1.2, so `1e-3` is one. The options of a method stand on [its page](methods/README.md).
"""


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the text of the page."""
    from r1p_dist.config_reference import sections

    return "\n".join([_HEAD, *(line for section in sections() for line in _section(section))])


def _section(section: Section) -> Iterator[str]:
    yield f"## {section.name or 'The run'}\n"
    yield f"{section.meaning}\n"
    yield "| Key | Default | Meaning |"
    yield "| --- | --- | --- |"
    for key in section.keys:
        default = f"`{key.default}`" if key.default else "must be given"
        yield f"| `{key.name}` | {default} | {_meaning(key)} |"
    yield ""


def _meaning(key: Key) -> str:
    choices = " or ".join(f"`{choice}`" for choice in key.choices)
    return key.meaning.replace("|", "\\|") + (f" One of {choices}." if choices else "")


if __name__ == "__main__":
    main()
