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


# of a method, beside the recipe's own
OPTIONS = {"dac": [], "lora": [], "steady": ["options.outer_ridge=0.1", "options.batches=2"]}


def command_lines(rank: int, world_size: int, lines: list[list[str]]) -> list[int]:
    os.chdir("/")  # a run folder works from any directory
    return [cli.main(argv) for argv in lines]


def run_both(rank: int, world_size: int, whole: list[str], folder: str, words: list[str]) -> list[str]:
    """Runs all tasks, and then others from FOLDER."""
    first = run_once(rank, world_size, whole)
    os.chdir(folder)
    return [first, run_once(rank, world_size, words)]


@pytest.fixture(scope="module")
def extended(run_distributed, toy: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns extended(method) -> folder of two runs: calm had all tasks, stopped was extended by the last one."""
    stream = toy[0].removeprefix("stream=")

    @functools.cache
    def extend(method: str) -> Path:
        folder, settings = tmp_path_factory.mktemp(method), [*toy, f"method={method}", *OPTIONS[method]]
        whole = [TASKS.replace("]", f", {MORE}]"), f"run_dir={folder}/calm", *settings]
        there, here = Path(stream).parent, ["stream=./stream", "backbone.name=local-dir:model"]
        words = [f"run_dir={folder}/stopped", *settings, *here]
        assert run_distributed(run_both, 1, whole, str(there), words) == [["finished", "finished"]]
        argv = ["extend", f"{folder}/stopped", "--task", f"{stream}:{MORE}"]
        assert run_distributed(command_lines, 1, [argv]) == [[0]]
        # the added columns are evaluated later, so only the order of the lines differs
        both = [sorted((folder / part / "correct.jsonl").read_text().splitlines()) for part in ("calm", "stopped")]
        assert both[0] == both[1]
        (folder / "stopped/correct.jsonl").write_bytes((folder / "calm/correct.jsonl").read_bytes())
        return folder

    return extend


@pytest.mark.slow
@pytest.mark.parametrize("method", OPTIONS)
def test_an_extended_run_equals_one_that_had_all_tasks(extended, method: str) -> None:
    folder = extended(method)
    assert len(read_metrics(folder / "stopped")["accuracy"]) == 4
    assert_equal(folder / "calm", folder / "stopped")


@pytest.mark.slow
def test_an_extended_run_is_held_to_what_the_tasks_before_it_left(extended) -> None:
    penalties = []
    for part in ("calm", "stopped"):
        lines = [json.loads(line) for line in (extended("steady") / part / "log.jsonl").read_text().splitlines()]
        penalties.append([line["loss_inputs"] for line in lines if line.get("task") == MORE and "loss_inputs" in line])
    assert penalties[0] == penalties[1] and penalties[0] and all(penalties[0])


@pytest.mark.slow
def test_a_forgotten_task_leaves_the_pristine_weights_and_the_others(run_distributed, extended, toy: list[str]) -> None:
    stream, model_folder = (Path(setting.partition("=")[2].removeprefix("local-dir:")) for setting in toy)
    dac, steady, lora = (extended(method) / "stopped" for method in ("dac", "steady", "lora"))
    words = [(dac, "animal_silhouettes"), (steady, "animal_silhouettes"), (dac, "fashion"), (lora, "playing_cards")]
    lines = [["forget", str(run), task] for run, task in words]
    assert run_distributed(command_lines, 1, lines, timeout_s=1100) == [[0, 0, 2, 2]]
    for run in (dac, steady):
        found = json.loads((run / "without-animal_silhouettes/metrics.json").read_text())
        kept = [path.name for path in sorted((run / "without-animal_silhouettes/adapters").iterdir())]
        assert kept == ["00-playing_cards", "02-country_flags"] and found["with"] == read_metrics(run)["accuracy"][-1]
        model, preprocess, tokenizer = plain_clip(model_folder)
        add_adapters(model, run / "without-animal_silhouettes/adapters")
        expected = [accuracy(model, preprocess, tokenizer, task, stream) for task in found["tasks"]]
        assert found["without"] == pytest.approx(expected)


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
