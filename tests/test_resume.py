"""Runs that a signal ends and that go on: the same numbers, bit for bit, as a run that nobody disturbed."""

import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import r1p_dist.report.write
from r1p_dist.checkpoint.checkpoints import checkpoint_folders
from r1p_dist.errors import InputError, Interrupted
from r1p_dist.recipes import load_config
from tests.test_train import read_metrics

TASKS = "tasks=[playing_cards, animal_silhouettes]"
SHORT = [TASKS, "train.iterations=4", "train.global_batch_size=8", "train.lr=1e-2", "log.every_steps=3"]


def without_reports() -> None:
    """A run's page is not what is compared here, and takes a quarter of a short run."""
    assert callable(r1p_dist.report.write.write_report)
    r1p_dist.report.write.write_report = lambda run_dir: None


def run_in_parts(rank: int, world_size: int, folder: str, overrides: list[str], signals: list[int]) -> list[str]:
    """Runs undisturbed in FOLDER/calm, then in FOLDER/stopped with a signal to the last rank after so many moves.

    A move is a micro step or a batch of an evaluation. Returns what ended each part of the second run.
    """
    from r1p_dist.interrupts import Watchdog
    from r1p_dist.train import run

    without_reports()
    moved = Watchdog.moved

    def stop(watchdog: Watchdog) -> None:
        moved(watchdog)
        if left:
            left.pop()
            if not left and rank == world_size - 1:
                os.kill(os.getpid(), next(kinds))

    run(load_config("mini_mtil", [*SHORT, *overrides, f"run_dir={folder}/calm"]))
    Watchdog.moved = stop
    endings, kinds = [], itertools.cycle([signal.SIGUSR2, signal.SIGINT])
    for wanted in [*signals, 0]:
        left = [None] * wanted
        try:
            run(load_config("mini_mtil", [*SHORT, *overrides, f"run_dir={folder}/stopped"]))
            endings.append("finished")
        except Interrupted as error:
            endings.append(str(error))
    Watchdog.moved = moved
    return endings


def experts(run_dir: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}.{name}": tensor
        for path in sorted(run_dir.glob("adapters/*/adapter.safetensors"))
        for name, tensor in load_file(path).items()
    }


def log_lines(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("task", "step", "loss", "loss_ago", "lr") if key in line} for line in lines]


def assert_equal(calm: Path, stopped: Path) -> None:
    ours, theirs = experts(calm), experts(stopped)
    assert ours.keys() == theirs.keys() and ours
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    one, other = read_metrics(calm), read_metrics(stopped)
    assert one | {"wall_seconds": 0} == other | {"wall_seconds": 0}
    assert log_lines(calm) == log_lines(stopped)
    assert (calm / "correct.jsonl").read_bytes() == (stopped / "correct.jsonl").read_bytes()


CASES = {
    "dropout, lagged votes, accumulation": [
        "deepspeed.config=zero2",
        "options.dropout=0.2",
        "options.vote=lagged",
        "train.gradient_accumulation_steps=2",
    ],
    "bf16, sharded, gated": [
        "deepspeed.config=zero3",
        "deepspeed.overrides.zero_optimization.stage3_param_persistence_threshold=0",
        "train.precision=bf16",
        "options.router_grad=gated",
    ],
    "all past columns, workers": [
        "deepspeed.config=zero0",
        "options.ago.reduction=code_all",
        "data.workers=1",
    ],
    "lora kept going, replay": ["deepspeed.config=zero1", "method=lora", "data.replay_share=0.25"],
    "lora begun anew": ["deepspeed.config=zero2", "method=lora", "options.restart=true", "options.dropout=0.1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_ends_as_an_undisturbed_one(
    run_distributed, shallow_toy: list[str], tmp_path: Path, case: str
) -> None:
    # twice, or once in the second task
    signals = [5, 6] if case in list(CASES)[:2] else [11]
    overrides = [*shallow_toy, *CASES[case]]
    endings = run_distributed(run_in_parts, 2, str(tmp_path), overrides, signals, timeout_s=1100)
    assert endings[0] == endings[1] and endings[0][-1] == "finished"
    stops = endings[0][:-1]
    assert [stop.split()[0] for stop in stops] == ["SIGUSR2", "SIGINT"][: len(signals)]
    assert all("resumes there" in stop for stop in stops)
    assert any("at task" in stop for stop in stops)  # the other one may fall into an evaluation
    assert_equal(tmp_path / "calm", tmp_path / "stopped")


def run_once(rank: int, world_size: int, overrides: list[str], stop_at: int | None = None) -> str:
    from r1p_dist.interrupts import Watchdog
    from r1p_dist.train import run

    without_reports()

    moved, steps = Watchdog.moved, []

    def at_step(watchdog: Watchdog) -> None:
        moved(watchdog)
        steps.append(None)
        if len(steps) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    Watchdog.moved = at_step
    try:
        run(load_config("mini_mtil", [*SHORT, *overrides]))
    except (InputError, Interrupted) as error:
        return str(error)
    return "finished"


@pytest.mark.slow
def test_another_number_of_ranks_and_another_stage_go_on_with_the_same_samples(
    run_distributed, shallow_toy: list[str], tmp_path: Path
) -> None:
    calm, stopped = [*shallow_toy, f"run_dir={tmp_path}/calm"], [*shallow_toy, f"run_dir={tmp_path}/stopped"]
    assert run_distributed(run_once, 1, calm, timeout_s=1100) == ["finished"]
    two = run_distributed(run_once, 2, [*stopped, "deepspeed.config=zero3"], 6, timeout_s=1100)
    assert "SIGTERM" in two[0]
    refused = run_distributed(run_once, 3, stopped, timeout_s=1100)[0]
    assert "train.global_batch_size=8 does not divide into 3 ranks" in refused or "is not divisible" in refused
    assert run_distributed(run_once, 1, [*stopped, "deepspeed.config=zero1"], timeout_s=1100) == ["finished"]
    ours, theirs = experts(tmp_path / "calm"), experts(tmp_path / "stopped")
    updates = [
        {name: run[f"{name}.B"] @ run[f"{name}.A"] for name in {key.rpartition(".")[0] for key in run}}
        for run in (ours, theirs)
    ]
    total = sum(update.square().sum() for update in updates[0].values()).sqrt()
    error = sum((updates[0][name] - updates[1][name]).square().sum() for name in updates[0]).sqrt()
    assert error / total < 1e-3
    assert [line["step"] for line in log_lines(tmp_path / "stopped")] == [3, 4, 3, 4]


@pytest.mark.slow
def test_a_finished_run_stays_as_it_is_and_keeps_one_checkpoint_per_task(
    run_distributed, shallow_toy: list[str], tmp_path: Path
) -> None:
    settings = [*shallow_toy, f"run_dir={tmp_path}", "checkpoint.every_steps=1", "checkpoint.keep=1"]
    assert run_distributed(run_once, 1, settings, timeout_s=1100) == ["finished"]
    names = [
        str(folder.relative_to(tmp_path / "checkpoints")) for folder in checkpoint_folders(tmp_path / "checkpoints")
    ]
    assert names == ["01-animal_silhouettes/step-4", "01-animal_silhouettes/step-3", "00-playing_cards/step-4"]
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "checkpoints" / names[1]).iterdir()}
    numbers = read_metrics(tmp_path)["trainable_parameters"]
    assert 12 * numbers < sizes["training.safetensors"] < 12 * numbers * 1.02
    before = {path: path.read_bytes() for path in tmp_path.rglob("adapter.safetensors")}
    metrics = read_metrics(tmp_path)
    (tmp_path / "metrics.json").unlink()  # as if killed just before it was written
    assert run_distributed(run_once, 1, settings, timeout_s=1100) == ["finished"]
    assert {**read_metrics(tmp_path), "wall_seconds": 0} == {**metrics, "wall_seconds": 0}
    assert {path: path.read_bytes() for path in before} == before
    refused = run_distributed(run_once, 1, [*settings, "train.lr=5e-3"], timeout_s=1100)[0]
    assert "train.lr: 0.01 there, 0.005 here" in refused and "resume=never" in refused

    begun = tmp_path / "checkpoints/00-playing_cards/step-4"
    other = [*shallow_toy, f"run_dir={tmp_path}/other", f"resume={begun}"]
    assert run_distributed(run_once, 1, other, timeout_s=1100) == ["finished"]
    ours, theirs = experts(tmp_path), experts(tmp_path / "other")
    assert theirs and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert read_metrics(tmp_path / "other")["accuracy"] == metrics["accuracy"]
    merged = [path.name for path in sorted((tmp_path / "other").glob("checkpoints/*/*/merged-*"))]
    assert merged == ["merged-00.safetensors", "merged-01.safetensors"]
    assert [line["task"] for line in log_lines(tmp_path / "other")] == ["animal_silhouettes"] * 2
