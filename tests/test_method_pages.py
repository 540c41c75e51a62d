"""docs/methods: pages made from the methods' own words, and the one that helps to choose."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from r1p_dist.methods import shipped_methods
from tests.documents import imported_tool

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs/methods"


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    yield from imported_tool("write_method_pages")


def test_pages_say_what_the_methods_say_now(tool: ModuleType) -> None:
    made = tool.pages()
    assert {path.name for path in PAGES.iterdir()} == {*made, "choosing.md"}
    old = [name for name, text in made.items() if (PAGES / name).read_text(encoding="utf-8") != text]
    assert not old, f"of another time: {', '.join(old)}; run python tools/dev/write_method_pages.py"


def row_of(page: Path, label: str) -> list[str]:
    return re.search(rf"^\| {label} \| (.+) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)[1].split(" | ")


def test_rows_are_those_of_the_results() -> None:
    for name, label in (("lora", "lora"), ("steady", "steady_no_anchor"), ("er", "er_weight_2")):
        row = row_of(ROOT / "docs/results.md", label)
        transfer, average, last, seen, unseen, own, forgetting, recovered, seeds = row
        found = row_of(PAGES / f"{name}.md", label)
        assert found[:6] == [transfer, average, last, seen, unseen, recovered]
        assert [found[7], *found[9:]] == [own, forgetting, seeds]


def test_the_readme_has_columns_of_the_results() -> None:
    for label in ("zero_shot", "lora", "joint", "dac", "er", "steady"):
        transfer, average, last, _, _, _, forgetting, recovered, *_ = row_of(ROOT / "docs/results.md", label)
        assert row_of(ROOT / "README.md", label) == [transfer, average, last, forgetting, recovered]
    assert f"[{len(shipped_methods())}](docs/methods/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_page_has_text_layer_paper_and_options(tool: ModuleType) -> None:
    page = tool.pages()["so_ra.md"]
    assert "# so_ra\n\nSoRA: gated ranks, thresholded after each step;" in page
    assert "After each step gate <- sign(gate) max(|gate| - lr * sparsity, 0)." in page
    assert "`SparseGates`: A gated LoRA with a penalty weight * sum |gate|; 0: none." in page
    assert "[arXiv 2311.11696](https://arxiv.org/abs/2311.11696)" in page
    assert r"| `options.weight` | `10.0` | Of `code`: of the mean of \|gate\| over all linears, in the loss. |" in page


def test_the_page_that_helps_to_choose_has_every_method() -> None:
    page = (PAGES / "choosing.md").read_text(encoding="utf-8")
    missing = [name for name in shipped_methods() if f"[{name}]({name}.md)" not in page]
    assert not missing, f"docs/methods/choosing.md says nothing of {', '.join(missing)}"


def test_links_lead_somewhere() -> None:
    for page in PAGES.iterdir():
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("https://"):
                assert (PAGES / target).is_file(), f"{page.name}: {target}"
