"""The check of a card, in its CPU form, and what it does with a case that fails, hangs or finds nothing to run on."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.forked_launch import ForkedProgram

TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    folders = [str(TOOLS), str(TOOLS / "dev")]
    sys.path[:0] = folders
    yield importlib.import_module("gpu_check")
    for folder in folders:
        sys.path.remove(folder)


def start_forked(function: str, call: Mapping[str, Any], options: Mapping[str, Any], log: Path) -> ForkedProgram:
    """Stands for `start` without the seconds of imports; others show how a new Python begins and ends."""
    return ForkedProgram(run_case_on_cpu, (function, json.dumps(call), json.dumps(options)), log)


def run_case_on_cpu(function: str, call: str, options: str) -> None:
    case = importlib.import_module("gpu_check_parts.case")
    os.environ.update(case.ON_CPU)
    case._main(function, call, options)


@pytest.mark.slow
def test_the_cpu_form_passes_every_part_but_the_recipes(tool: ModuleType, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(importlib.import_module("gpu_check_parts.case"), "start", start_forked)
    file = tmp_path / "check.json"
    # minutes: an upper limit, for machines that do much else; b: `make smoke` trains the recipes
    words = f"--device cpu --quick --parts a,c,d,e,f --minutes 30 --folder {tmp_path / 'runs'} --json {file}"
    code = tool.main(words.split())
    out = capsys.readouterr().out
    assert code == 0, out
    result = json.loads(file.read_text())
    found = {entry["name"]: entry for part in result["parts"].values() for entry in part["results"]}
    assert [part["outcome"] for part in result["parts"].values()].count("PASS") == 5, out
    assert found["zero3"]["different_votes"] == 0 and found["zero3"]["update"] <= 1e-3
    assert found["resume bit for bit"]["equal_tasks"] == 2
    assert found["mini_mtil_dac"] == {"name": "mini_mtil_dac", "outcome": "pass", "steps": 2, "waits": {}}
    assert found["tiny, 2"]["step/limit"] > 0 and found["tiny_llava, 2, checkpointing: forward"]["merged/plain"] > 0
    assert result["machine"]["versions"]["torch"] and result["machine"]["card"] is None


def test_a_recipe_has_to_end_above_zero_shot(tool: ModuleType, tmp_path: Path, monkeypatch) -> None:
    case, recipes, parts = (importlib.import_module(f"gpu_check_parts.{name}") for name in ("case", "recipes", "parts"))
    report, commands = case.Report("b", tmp_path / "b.jsonl", tmp_path, "cpu", True, 600), []

    def launch(command: list[str]) -> subprocess.CompletedProcess:
        commands.append(command)
        folder = tmp_path / command[command.index("--recipe") + 1]
        folder.mkdir()
        rows = [[10.0, 20.0], [60.0, 0.0], [10.0, 20.0 + (folder.name == "mini_mtil_smoke")]]
        (folder / "metrics.json").write_text(json.dumps({"accuracy": rows, "wall_seconds": 7.0}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(recipes.subprocess, "run", launch)
    for planned in parts.cases("b", quick=False):
        recipes.smoke(report, **planned.options)
    found = [json.loads(line) for line in report.path.read_text().splitlines()]
    assert found == [
        {"name": "mini_mtil_smoke", "outcome": "pass", "zero_shot": 15.0, "last": 15.5, "run_seconds": 7.0},
        {"name": "mini_instruct_smoke", "outcome": "fail", "zero_shot": 15.0, "last": 15.0, "run_seconds": 7.0},
    ]
    assert all(Path(word).is_file() for command in commands for word in command if word.endswith("train.py"))
    monkeypatch.setattr(recipes.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 2))
    with pytest.raises(RuntimeError, match="the launcher ended with code 2"):
        recipes.smoke(report, "mini_mtil_smoke")


CASES = """
import time
from gpu_check_parts.case import NotPossibleError

def fail(report):
    report.check("half", True, figure=1)
    raise ValueError("no memory")

def hang(report):
    report.check("half", True)
    time.sleep(600)

def lack(report):
    raise NotPossibleError("not here")
"""


def test_a_case_that_fails_or_hangs_keeps_what_it_found_and_ends_nothing_else(
    tool: ModuleType, tmp_path: Path, monkeypatch
) -> None:
    case = importlib.import_module("gpu_check_parts.case")
    (tmp_path / "some_cases.py").write_text(CASES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = {
        name: case.run_case(case.Case(name, f"some_cases:{name}"), tmp_path, "cpu", True, limit)
        for name, limit in (("fail", 60.0), ("hang", 3.0), ("lack", 60.0))
    }
    half = {"name": "half", "outcome": "pass"}
    assert run["fail"][0] == {**half, "figure": 1}
    assert run["fail"][1]["reason"] == "ended with code 1: ValueError: no memory"
    assert run["hang"][-1]["reason"] == "stopped at its limit of 3 s"
    assert run["lack"] == [{"name": "lack", "outcome": "skip", "reason": "not here"}]
    assert [tool.outcome(results) for results in run.values()] == ["FAIL", "FAIL", "SKIPPED"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("--parts a,x --device cpu", "--parts a,x: no part 'x'; there are a, b, c, d, e, f"),
        ("--minutes 0 --device cpu", "--minutes 0.0: must be above zero"),
    ],
)
def test_wrong_input_is_refused(tool: ModuleType, capsys, arguments: str, error: str) -> None:
    assert tool.main(arguments.split()) == 2
    assert f"error: {error}" in capsys.readouterr().err


def test_what_no_longer_fits_is_skipped(tool: ModuleType, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(tool, "run_case", lambda *_: [{"name": "machine", "outcome": "figure", "card": "some card"}])
    assert tool.main(f"--parts c --minutes 0.1 --folder {tmp_path / 'runs'} --json {tmp_path / 'c.json'}".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("c steps        SKIPPED")
    assert len(lines) == 2 + 10 and all("s left of this part" in line for line in lines[2:])
    assert json.loads((tmp_path / "c.json").read_text())["parts"]["c"]["outcome"] == "SKIPPED"


@pytest.mark.parametrize(
    ("card", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", None), ("Other", None)],
)
def test_the_peak_of_a_card_is_known_by_its_name(tool: ModuleType, card: str, peak: float | None) -> None:
    assert importlib.import_module("gpu_check_parts.steps").known_peak(card) == peak


def test_results_of_a_card_become_tables(tool: ModuleType, tmp_path: Path) -> None:
    speed = {
        "name": "M, 8",
        "outcome": "figure",
        "rounds": 5,
        "step/limit": 1.25,
        "peft/step": 1.5,
        "steady/step": 1.02,
    }
    speed |= {"samples_per_second": {"limit": 100.0, "step": 80.0}, "utilisation": {"limit": 0.5, "step": 0.4}}
    memory = {
        "name": "M, 8: memory",
        "outcome": "figure",
        "memory step/limit": 1.05,
        "gb": {"limit": 10.0, "step": 10.5},
    }
    forward = {"name": "M, 8: forward", "outcome": "figure", "merged/plain": 1.0, "samples_per_second": {"plain": 9.0}}
    compiled = {"name": "M, 8: compiled", "outcome": "figure", "rounds": 5, "compiled/limit": 1.1}
    skipped = {"name": "other", "outcome": "skip", "reason": "no time"}
    part = {"title": "steps", "outcome": "PASS", "seconds": 9.0, "results": [speed, memory, compiled, forward, skipped]}
    (tmp_path / "gpu").mkdir()
    content = {"machine": {"card": "Some card"}, "parts": {"c": part}}
    (tmp_path / "gpu" / "card.json").write_text(json.dumps(content))
    table = importlib.import_module("benchmarks.table")
    parts, steps = table.run(type("Arguments", (), {"folder": tmp_path})).split("\n\n")
    assert parts.splitlines()[2] == "| Some card | steps | PASS | 0 | 0 | 1 |"
    assert steps.splitlines()[0].count("|") == steps.splitlines()[2].count("|") == 12
    row = "| Some card | M, 8 | 80.0 | 0.400 | 10.5 | 1.250 | 1.100 | 1.020 | 1.500 | 1.050 | 1.000 |"
    assert steps.splitlines()[2] == row


def test_what_peft_or_the_compiler_fails_at_takes_no_other_figure_along(
    tool: ModuleType, tmp_path: Path, monkeypatch
) -> None:
    steps, case = (importlib.import_module(f"gpu_check_parts.{name}") for name in ("steps", "case"))

    def fail(*_) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(steps.VARIANTS, "peft", fail)
    report = case.Report("c", tmp_path / "c.jsonl", tmp_path, "cpu", True, 600)
    monkeypatch.setattr(steps, "_has_peft", lambda: True)
    steps.model(report, "tiny", 2)
    failed, speed, *_ = [json.loads(line) for line in report.path.read_text().splitlines()]
    assert failed == {"name": "tiny, 2: peft", "outcome": "fail", "reason": "RuntimeError: no such kernel"}
    assert speed["name"] == "tiny, 2" and speed["step/limit"] > 0 and "peft/step" not in speed


def test_aims_are_said_beside_the_figures(tool: ModuleType) -> None:
    aims = importlib.import_module("gpu_check_parts.steps")._aims
    assert aims(SimpleNamespace(model="ViT-L-14", batch=64), {"step/limit": 1.2, "peft/step": 1.4}) == {
        "aim step/limit": "<= 1.1: missed",
        "aim peft/step": ">= 1.3: met",
    }
    assert aims(SimpleNamespace(model="ViT-B-16", batch=32), {"compiled/limit": 1.2}) == {
        "aim compiled/limit": "<= 1.3: met"
    }
    assert aims(SimpleNamespace(model="tiny", batch=2), {"step/limit": 2.0}) == {}
