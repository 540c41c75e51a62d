"""README and docs/: links lead somewhere, the pages build without a warning, and what they quote is in the code."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from r1p_dist import errors, run_files
from r1p_dist.safe_yaml import parse_yaml
from tests.documents import DOCS, PAGES, ROOT, fences, name_of, without_fences

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target.partition("#")[0] for target in LINK.findall(without_fences(page))]
    inside = [target for target in targets if target and "://" not in target]
    missing = [target for target in inside if not (page.parent / target).exists()]
    assert not missing, f"{name_of(page)}: {', '.join(missing)}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    return folder


def test_the_site_has_every_page_and_shows_what_it_has_not_as_code(site: Path) -> None:
    pages = {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.rglob("*.md")}
    pages = {re.sub(r"(^|/)README\.html$", r"\1index.html", page) for page in pages}
    built = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert built == pages | {"404.html"}
    data = (site / "data.html").read_text(encoding="utf-8")
    assert "sample (<code>r1p_dist/data/order.py</code>)" not in data
    assert "<code>r1p_dist/data/stream.py</code>" in data
    assert (
        "The shipped stream" not in data
        and "the shipped stream (<code>r1p_dist/assets/mini_mtil/stream.yaml</code>)" in data
    )
    navigation = (site / "index.html").read_text(encoding="utf-8")
    assert all(f'href="methods/{path.stem}.html"' in navigation for path in DOCS.glob("methods/[a-z]*.md"))


def test_no_page_fetches_anything_or_leads_out_of_the_site(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe|source)[^>]*\ssrc="?(https?:[^">\s]+)', text)
        fetched += re.findall(r'<link[^>]*rel="?(?:stylesheet|preconnect)[^>]*href="?(https?:[^">\s]+)', text)
        assert not fetched, f"{page.name}: {fetched}"
        for target in re.findall(r'href="(?!\w+:)([^"#?]+)', text):
            there = site / target.lstrip("/") if target.startswith("/") else page.parent / target
            assert there.resolve().is_relative_to(site) and there.exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_called_yaml_or_json_is(page: Path) -> None:
    for text in fences(page, "yaml"):
        parse_yaml(text, name_of(page))
    for text in fences(page, "json"):
        while text := text.strip():
            text = text[json.JSONDecoder().raw_decode(text)[1] :]


def test_the_page_of_backbones_shows_the_code_that_is_shipped() -> None:
    code = (ROOT / "r1p_dist/kinds/open_clip/__init__.py").read_text(encoding="utf-8")
    blocks = fences(DOCS / "add_a_backbone.md", "python")
    assert blocks and all(block in code for block in blocks)


def test_the_page_of_files_names_all_that_a_run_writes() -> None:
    page = (DOCS / "files.md").read_text(encoding="utf-8")
    names = [name for key, name in vars(run_files).items() if key.isupper()]
    assert len(names) > 10 and not [name for name in names if f"`{name}" not in page]


def _texts_of_code() -> list[str]:
    """Return the texts in the code, those that are put together on one line, with … for what is filled in."""
    texts = [(ROOT / "Makefile").read_text(encoding="utf-8")]
    for path in (ROOT / "r1p_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_the_lines_of_troubleshooting_are_those_of_the_code() -> None:
    texts = _texts_of_code()
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").partition("## Installing")[2]
    cells = re.findall(r"^\| (.*?) \| ", page, re.MULTILINE)
    lines = [line for cell in cells for line in re.findall(r"`([^`]+)`", cell)]
    assert len(lines) > 50
    patterns = {line: re.compile(".*".join(re.escape(part.strip()) for part in line.split("…"))) for line in lines}
    unsaid = [line for line, pattern in patterns.items() if not any(pattern.search(text) for text in texts)]
    assert not unsaid, f"troubleshooting.md: the code does not say: {'; '.join(unsaid)}"


def test_the_exit_codes_of_troubleshooting_are_those_of_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    named = {name: int(code) for code, name in re.findall(r"^\| (\d+) \| `(EXIT_\w+)` \|", page, re.MULTILINE)}
    assert named == {name: value for name, value in vars(errors).items() if name.startswith("EXIT_")}
