"""The commands of docs/tutorial.md, all of them in their order, on a few small pictures and with few iterations."""

import json
import os
import shlex
from pathlib import Path

import pytest

from r1p_dist import cli
from tests.data.converting import picture
from tests.documents import DOCS, fences

PAGE = DOCS / "tutorial.md"
CLASSES = {"trees": ("beech", "elm", "oak"), "birds": ("owl", "wren")}


def write_pictures(folder: Path) -> None:
    for name, classes in CLASSES.items():
        for label, class_name in enumerate(classes):
            (folder / name / class_name).mkdir(parents=True)
            for number in range(4):
                path = folder / name / class_name / f"IMG_{number}.jpg"
                path.write_bytes(picture(10 * label + number, "JPEG", (64, 64)))
    (folder / "leaf.jpg").write_bytes(picture(99, "JPEG", (80, 60)))


def write_recipe(folder: Path) -> None:
    (recipe,) = fences(PAGE, "yaml")
    for part, smaller in (("iterations: 50", "iterations: 2"), ("global_batch_size: 32", "global_batch_size: 4")):
        assert part in recipe
        recipe = recipe.replace(part, smaller)
    (folder / "trees.yaml").write_text(recipe)


def commands() -> list[list[str]]:
    lines = [line for block in fences(PAGE, "") for line in block.splitlines()]
    assert lines[0] == "make setup"
    words = [shlex.split(line) for line in lines[1:]]
    assert all(program == ".venv/bin/r1p" for program, *_ in words)
    return [rest for _, *rest in words]


def run_in(rank: int, world_size: int, folder: str, lines: list[list[str]]) -> list[int]:
    os.chdir(folder)
    return [cli.main(words) for words in lines]


@pytest.mark.slow
def test_every_command_of_the_tutorial(run_distributed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path)
    write_recipe(tmp_path)
    conversions = [words for words in commands() if words[0] == "convert"]
    rest = [words for words in commands() if words[0] != "convert"]
    assert [cli.main(words) for words in conversions] == [0] * 4
    assert run_distributed(run_in, 1, str(tmp_path), rest) == [[0] * len(rest)]

    metrics = json.loads((tmp_path / "runs/trees/metrics.json").read_text())
    assert metrics["tasks"] == ["tree_shards", "bird_shards"] and len(metrics["accuracy"]) == 3
    forgotten = json.loads((tmp_path / "runs/trees/without-tree_shards/metrics.json").read_text())
    assert forgotten["with"] == metrics["accuracy"][-1]
    assert (tmp_path / "runs/trees/report.html").is_file() and (tmp_path / "trees.png").is_file()

    (usage,) = fences(PAGE, "python")
    names: dict[str, object] = {}
    exec(usage, names)
    assert names["model"].visual.image_size == (64, 64) and len(names["tokenizer"](["an oak"])) == 1
