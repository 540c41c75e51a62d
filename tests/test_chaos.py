"""The campaign of kills in its short form: real ranks, real SIGKILLs, and the same bits in the end."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from tests.forked_launch import ForkedLaunch

TOOL = Path(__file__).resolve().parents[1] / "tools" / "dev" / "chaos.py"


@pytest.fixture(scope="module")
def chaos() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chaos", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kills_pass_through_tasks_and_phases_in_the_runs_order(chaos: ModuleType) -> None:
    aims = chaos._aims(50, ["a", "b", "c", "d"])
    assert [task for task, _, _ in aims] == [task for task in "abcd" for _ in chaos.PHASES]
    assert [phase for _, phase, _ in aims] == list(chaos.PHASES) * 4
    assert sum(count for _, _, count in aims) == 50
    assert all(sum(count for _, phase, count in aims if phase == aim) >= 12 for aim in chaos.PHASES)


def test_a_difference_is_found(chaos: ModuleType, tmp_path: Path) -> None:
    for name in ("calm", "hunted"):
        folder = tmp_path / name / "adapters/00-a"
        folder.mkdir(parents=True)
        (folder / "adapter.safetensors").write_bytes(b"same")
        (tmp_path / name / "metrics.json").write_text(json.dumps({"last": 3, "wall_seconds": len(name)}))
        (tmp_path / name / "correct.jsonl").write_text("x")
        line = {"step": 1, "loss": 2.0, "samples_per_second": len(name), "data_wait": 0}
        (tmp_path / name / "log.jsonl").write_text(json.dumps(line) + "\n")
    assert chaos.compare(tmp_path / "calm", tmp_path / "hunted") == []
    (tmp_path / "hunted/adapters/00-a/adapter.safetensors").write_bytes(b"sane")
    (tmp_path / "hunted/metrics.json").write_text(json.dumps({"last": 4, "wall_seconds": 1}))
    assert chaos.compare(tmp_path / "calm", tmp_path / "hunted") == [
        "adapters/00-a/adapter.safetensors",
        "metrics.json",
    ]


def forked(command: list[str], log: Path) -> ForkedLaunch:
    words = command[command.index("launchers/train.py") + 1 :]
    return ForkedLaunch(words, log)


def forked_victims(everyone: list[psutil.Process], victim: str) -> list[psutil.Process]:
    launcher, *ranks = everyone
    return [launcher] if victim == "launcher" else ranks if victim == "all ranks" else [ranks[int(victim[-1])]]


@pytest.mark.slow
@pytest.mark.parametrize("is_forked", [True, pytest.param(False, marks=pytest.mark.campaign)])
def test_a_run_that_is_killed_four_times_ends_as_one_that_was_not(
    chaos: ModuleType, toy: list[str], tmp_path: Path, capsys, monkeypatch, is_forked: bool
) -> None:
    """In the campaign's own form through DeepSpeed's launcher; in the short one without the minute of its imports."""
    if is_forked:
        command = chaos._command
        monkeypatch.setattr(
            chaos, "_start", lambda run, *rest: forked(command(run, *rest), rest[-1].folder / f"{run.name}.log")
        )
        monkeypatch.setattr(chaos, "_family", ForkedLaunch.family)
        monkeypatch.setattr(chaos, "_victims", forked_victims)
    arguments = f"--kills 4 --per-phase 0 --tasks 1 --folder {tmp_path}/runs --json {tmp_path}/chaos.json --seed 3"
    assert chaos.main([*arguments.split(), "train.iterations=8", *toy]) == 0
    result = json.loads((tmp_path / "chaos.json").read_text())
    assert result["killed"] == 4 and result["is_equal"] and result["differences"] == []
    assert [kill["aimed_at"] for kill in result["kills"]] == list(chaos.PHASES)
    assert len(list((tmp_path / "runs/hunted").glob("adapters/*"))) == 1
