"""Whole runs on instructions: what they leave, going on where they were stopped, taking a task out, joint training."""

import json
import shutil
import tarfile
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from r1p_dist.data import Stream
from r1p_dist.data.stream import ASSETS
from r1p_dist.errors import InputError
from r1p_dist.recipes import load_config
from tests.small_clip import make_backbone
from tests.test_train import read_metrics

TASKS = ["yes_no", "read_digit"]
SHORT = [f"tasks=[{', '.join(TASKS)}]", "train.iterations=4", "train.lr=3e-2", "train.global_batch_size=8"]
SHORT += [
    "log.every_steps=2",
    "checkpoint.every_steps=2",
    "options.dropout=0.1",
    "backbone.gradient_checkpointing=true",
    "data.packing=true",
]


def run_stream(rank: int, world_size: int, overrides: list[str]) -> str:
    from r1p_dist.train import run

    return json.dumps(run(load_config("mini_instruct", overrides)))


def conversations(task: str) -> list[dict[str, Any]]:
    with tarfile.open(ASSETS / "mini_instruct" / task / "test-000000.tar") as tar:
        return [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]


def essence(run_dir: Path) -> dict[str, bytes]:
    kept = {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.glob("adapters/*/*")}
    metrics = read_metrics(run_dir)
    del metrics["wall_seconds"]
    kept |= {name: (run_dir / name).read_bytes() for name in ("answers.jsonl", "correct.jsonl")}
    return kept | {"metrics": json.dumps(metrics).encode()}


@pytest.mark.slow
def test_runs_on_two_ranks(run_distributed, tmp_path: Path) -> None:
    """One story, for the runs take their time: a run, the same from the middle, one task less."""
    from r1p_dist.forget import forget

    calm, again = tmp_path / "calm", tmp_path / "again"
    run_distributed(run_stream, 2, [*SHORT, f"run_dir={calm}"])
    metrics = read_metrics(calm)
    assert metrics["metric"] == ["exact_match", "exact_match"] and metrics["bad_samples"]["evaluation"] == [0, 0]
    records = [json.loads(line) for line in (calm / "answers.jsonl").read_text().splitlines()]
    assert [(record["row"], record["task"]) for record in records] == [
        (row, task) for row in range(3) for task in TASKS
    ]
    for record in records:
        expected = [turn["value"] for talk in conversations(record["task"]) for turn in talk["conversations"][1:]]
        right = [100 * (answer.lower() == truth) for answer, truth in zip(record["answers"], expected, strict=True)]
        assert metrics["accuracy"][record["row"]][TASKS.index(record["task"])] == pytest.approx(fmean(right))
    assert max(metrics["accuracy"][-1]) > 0
    assert all(0 <= rate <= 100 for row in metrics["instruction_following"] for rate in row)
    assert (calm / "report.html").stat().st_size > 10_000

    # as if it had been killed in the second task
    shutil.copytree(calm, again)
    for later in ("metrics.json", "adapters/01-read_digit", "checkpoints/01-read_digit/step-4"):
        shutil.rmtree(again / later) if (again / later).is_dir() else (again / later).unlink()
    run_distributed(run_stream, 2, [*SHORT, f"run_dir={again}"])
    assert essence(again) == essence(calm)

    found = forget(calm, "yes_no")
    assert found["tasks"] == TASKS and found["with"] == metrics["accuracy"][-1]


@pytest.mark.campaign
def test_joint_training_mixes_the_tasks(run_distributed, tmp_path: Path) -> None:
    overrides = [*SHORT, f"run_dir={tmp_path}", "method=joint", "data.group_by_length=2"]
    metrics = json.loads(run_distributed(run_stream, 1, [*overrides, "data.workers=1"])[0])
    assert len(metrics["accuracy"]) == 2 and len(metrics["instruction_following"]) == 2
    assert metrics["last"] == pytest.approx(fmean(metrics["accuracy"][1]))


def test_a_clip_does_not_take_conversations() -> None:
    with pytest.raises(InputError, match="has conversations, which backbone.kind=open_clip cannot answer"):
        make_backbone().check(Stream.load("mini_instruct"))
