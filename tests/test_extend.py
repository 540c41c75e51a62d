"""A finished run takes one more task, or loses one."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from r1p_dist import cli
from r1p_dist.data.stream import ASSETS, Stream
from r1p_dist.errors import InputError
from tests.test_resume import TASKS, assert_equal, run_once
from tests.test_train import accuracy, add_adapters, plain_clip, read_metrics

MORE = "country_flags"


def command_line(rank: int, world_size: int, argv: list[str]) -> int:
    os.chdir("/")  # a run folder works from any directory
    return cli.main(argv)


def run_from(rank: int, world_size: int, folder: str, overrides: list[str]) -> str:
    os.chdir(folder)
    return run_once(rank, world_size, overrides)


@pytest.fixture(scope="module")
def extended(run_distributed, toy: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns extended(method) -> folder of two runs: calm had all tasks, stopped was extended by the last one."""
    stream = toy[0].removeprefix("stream=")

    @functools.cache
    def extend(method: str) -> Path:
        folder, settings = tmp_path_factory.mktemp(method), [*toy, f"method={method}"]
        whole = [TASKS.replace("]", f", {MORE}]"), f"run_dir={folder}/calm", *settings]
        assert run_distributed(run_once, 1, whole) == ["finished"]
        there, here = Path(stream).parent, ["stream=./stream", "backbone.name=local-dir:model"]
        words = [f"run_dir={folder}/stopped", *settings, *here]
        assert run_distributed(run_from, 1, str(there), words) == ["finished"]
        argv = ["extend", f"{folder}/stopped", "--task", f"{stream}:{MORE}"]
        assert run_distributed(command_line, 1, argv) == [0]
        # the added columns are evaluated later, so only the order of the lines differs
        both = [sorted((folder / part / "correct.jsonl").read_text().splitlines()) for part in ("calm", "stopped")]
        assert both[0] == both[1]
        (folder / "stopped/correct.jsonl").write_bytes((folder / "calm/correct.jsonl").read_bytes())
        return folder

    return extend


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dac", "lora"])
def test_an_extended_run_equals_one_that_had_all_tasks(extended, method: str) -> None:
    folder = extended(method)
    assert len(read_metrics(folder / "stopped")["accuracy"]) == 4
    assert_equal(folder / "calm", folder / "stopped")


@pytest.mark.slow
def test_a_forgotten_task_leaves_the_pristine_weights_and_the_others(run_distributed, extended, toy: list[str]) -> None:
    stream, model_folder = (Path(setting.partition("=")[2].removeprefix("local-dir:")) for setting in toy)
    run = extended("dac") / "stopped"
    assert run_distributed(command_line, 1, ["forget", str(run), "animal_silhouettes"], timeout_s=1100) == [0]
    found = json.loads((run / "without-animal_silhouettes/metrics.json").read_text())
    kept = [path.name for path in sorted((run / "without-animal_silhouettes/adapters").iterdir())]
    assert kept == ["00-playing_cards", "02-country_flags"] and found["with"] == read_metrics(run)["accuracy"][-1]
    model, preprocess, tokenizer = plain_clip(model_folder)
    add_adapters(model, run / "without-animal_silhouettes/adapters")
    expected = [accuracy(model, preprocess, tokenizer, task, stream) for task in found["tasks"]]
    assert found["without"] == pytest.approx(expected)
    assert run_distributed(command_line, 1, ["forget", str(run), "fashion"], timeout_s=1100) == [2]
    lora = extended("lora") / "stopped"
    assert run_distributed(command_line, 1, ["forget", str(lora), "playing_cards"], timeout_s=1100) == [2]


def test_added_tasks_stand_behind_the_others_under_their_own_names() -> None:
    stream = Stream.load("mini_mtil", tasks=["fashion", "playing_cards"])
    longer = stream.extended(["mini_mtil:country_flags", f"{ASSETS / 'mini_mtil'}:furniture_3d"])
    names = ["fashion", "playing_cards", "country_flags", "furniture_3d"]
    assert [task.name for task in longer.tasks] == names and set(names) <= set(longer.known)
    assert stream.extended([]) == stream
    for entry, words in (
        ("mini_mtil:fashion", "already"),
        ("mini_mtil:fashoin", "nearest: fashion"),
        ("mini", "no such"),
    ):
        with pytest.raises(InputError, match=words):
            stream.extended([entry])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys) -> None:
    for argv in (["extend", str(tmp_path), "--task", "mini_mtil:fashion"], ["forget", str(tmp_path), "fashion"]):
        assert cli.main(argv) == 2
        assert "no config.yaml in it, so this is no run folder" in capsys.readouterr().err
