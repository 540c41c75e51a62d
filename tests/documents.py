"""The pages that people read: README.md, what stands beside it, and docs/."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(DOCS.rglob("*.md"))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(page: Path, language: str) -> list[str]:
    """Return what stands in a page's fenced blocks of a language; "": of none."""
    return [body for found, body in _FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def without_fences(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def imported_tool(name: str) -> Iterator[ModuleType]:
    """Yields a module of tools/dev, which makes pages; what it imports is found as long as it is in use."""
    sys.path.insert(0, str(ROOT / "tools/dev"))
    yield importlib.import_module(name)
    sys.path.remove(str(ROOT / "tools/dev"))
