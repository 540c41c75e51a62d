"""Runs on two real ranks over shards with bad pictures: replaced, left out and counted, or ended with one line."""

import json
import tarfile
from pathlib import Path

import pytest
import yaml

from r1p_dist.data.stream import ASSETS
from tests.data.toy_task import write_tar
from tests.forked_launch import ForkedLaunch
from tests.test_train import read_metrics, run_stream

BAD = {"train": (3, 50), "test": (0, 7, 41)}


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shipped tasks; some pictures of the first one are no pictures."""
    root = tmp_path_factory.mktemp("stream")
    content = yaml.safe_load((ASSETS / "mini_mtil/stream.yaml").read_text())
    tasks = [task for task in content["tasks"] if task["name"] in ("animal_silhouettes", "playing_cards")]
    for task in tasks:
        for split in ("train", "validation", "test"):
            task[split] = [str(ASSETS / "mini_mtil" / shard) for shard in task[split]]
        for key in ("class_names", "templates"):
            task[key] = str(ASSETS / "mini_mtil" / task[key])
    for split, numbers in BAD.items():
        with tarfile.open(tasks[0][split][0]) as tar:
            files = [(member.name, tar.extractfile(member).read()) for member in tar]
        pictures = [place for place, (name, _) in enumerate(files) if name.endswith(".jpg")]
        for number in numbers:
            name, jpeg = files[pictures[number]]
            files[pictures[number]] = (name, jpeg[: len(jpeg) // 2])
        tasks[0][split] = [str(write_tar(root / f"{split}.tar", files))]
    (root / "stream.yaml").write_text(yaml.safe_dump({"name": "bad", "tasks": tasks}))
    return root


def overrides(stream: Path, run_dir: Path, toy: list[str]) -> list[str]:
    return [toy[1], f"stream={stream}", "train.iterations=7", "log.every_steps=3", f"run_dir={run_dir}"]


@pytest.mark.slow
def test_bad_pictures_are_counted_over_all_ranks(run_distributed, stream: Path, toy: list[str], tmp_path: Path) -> None:
    settings = [*overrides(stream, tmp_path / "run", toy), "data.max_bad_fraction=0.02"]
    run_distributed(run_stream, 2, settings)
    metrics = read_metrics(tmp_path / "run")
    assert metrics["bad_samples"] == {"train": [2, 0], "evaluation": [3, 0]}
    rows = [json.loads(line) for line in (tmp_path / "run/correct.jsonl").read_text().splitlines()]
    sizes = {task: {len(row["correct"]) for row in rows if row["task"] == task} for task in metrics["tasks"]}
    content = yaml.safe_load((stream / "stream.yaml").read_text())["tasks"]
    expected = [task["sizes"]["test"] for task in content]
    assert sizes == {content[0]["name"]: {expected[0] - 3}, content[1]["name"]: {expected[1]}}
    assert "3 pictures of animal_silhouettes" in (tmp_path / "run/report.html").read_text()


@pytest.mark.slow
def test_too_many_bad_pictures_end_all_ranks_with_code_2(stream: Path, toy: list[str], tmp_path: Path) -> None:
    words = ["--recipe", "mini_mtil", *overrides(stream, tmp_path / "run", toy), "data.max_bad_fraction=0"]
    code, printed = ForkedLaunch(words, tmp_path / "log").wait(timeout=240), (tmp_path / "log").read_text()
    assert code == 2
    assert "task animal_silhouettes: 1 of " in printed and "and 0 may; mend them or set" in printed
    assert "Traceback" not in printed
