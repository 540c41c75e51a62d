"""The shipped stream of instruction tasks, and the tool that builds it."""

import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from r1p_dist.data.stream import ASSETS, SPLITS, Stream
from r1p_dist.evaluation.answers import Answer, follows_instruction, score
from tests.data.toy_task import read_webdataset

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "dev"
SHIPPED = ASSETS / "mini_instruct"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("build_mini_instruct")
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def samples() -> dict[tuple[str, str], list[dict]]:
    """(task, split) -> samples as plain webdataset reads them, with the .json parsed."""
    found = {}
    for task in Stream.load("mini_instruct").tasks:
        for split in SPLITS:
            (shard,) = getattr(task, split)
            found[task.name, split] = read_webdataset(shard)
            for sample in found[task.name, split]:
                sample["json"] = json.loads(sample["json"])
    return found


def question(sample: dict) -> str:
    return sample["json"]["conversations"][0]["value"].removeprefix("<image>\n")


def answer(sample: dict) -> str:
    return sample["json"]["conversations"][1]["value"]


def test_the_tool_gives_the_shipped_bytes(tool: ModuleType, tmp_path: Path):
    tasks = [task for task in tool.TASKS if task.name in ("yes_no", "which_flag")]
    tool.build_stream(tmp_path / "built", tasks)
    shards = sorted(path.relative_to(tmp_path / "built") for path in (tmp_path / "built").rglob("*.tar"))
    assert len(shards) == 6
    assert [
        shard for shard in shards if (tmp_path / "built" / shard).read_bytes() != (SHIPPED / shard).read_bytes()
    ] == []


def test_shipped_sizes_are_as_the_file_says_and_small(samples):
    stream = Stream.load("mini_instruct")
    assert len(stream.tasks) == 6 and all(task.is_instruction for task in stream.tasks)
    for task in stream.tasks:
        assert task.sizes == {split: len(samples[task.name, split]) for split in SPLITS}
        assert f"| {task.name} |" in (ASSETS / "NOTICE.md").read_text()
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 9e6


def test_pictures_are_those_of_mini_mtil_in_the_same_splits(tool: ModuleType, samples):
    pictures = {task.name: task for task in Stream.load("mini_mtil").tasks}
    for task in tool.TASKS:
        for split in SPLITS:
            originals = {
                sample["__key__"]: sample for sample in read_webdataset(getattr(pictures[task.pictures], split)[0])
            }
            mine = samples[task.name, split]
            assert len({sample["jpg"] for sample in mine}) == len(mine)
            for sample in mine:
                original = originals[sample["__key__"]]
                assert sample["jpg"] == original["jpg"]
                facts = json.loads(original["json"])
                assert {key: sample["json"][key] for key in ("source", "license")} == {
                    key: facts[key] for key in ("source", "license")
                }
        seen = {split: {sample["jpg"] for sample in samples[task.name, split]} for split in SPLITS}
        assert not seen["train"] & (seen["validation"] | seen["test"]) and not seen["validation"] & seen["test"]


def asked_in(wordings: Sequence[str], samples: list[dict]) -> set[str]:
    """Returns which of the wordings some sample has."""
    patterns = {wording: re.compile(re.sub(r"\\{[a-z]+\\}", "(?s:.+)", re.escape(wording))) for wording in wordings}
    return {wording for sample in samples for wording, found in patterns.items() if found.fullmatch(question(sample))}


def test_the_test_asks_in_words_that_training_never_has(tool: ModuleType, samples):
    for task in tool.TASKS:
        assert len(task.wordings) >= 6 and len(task.held_out) == 3
        for split in SPLITS:
            wordings = task.held_out if split == "test" else task.wordings
            used = asked_in((*task.wordings, *task.held_out), samples[task.name, split])
            assert used == set(wordings), (task.name, split)


def test_the_stream_to_choose_on_keeps_wordings_for_validation_and_knows_none_of_the_test(
    tool: ModuleType, tmp_path: Path
):
    names = ("yes_no", "caption")
    stream = tool.build_stream(tmp_path / "choosing", [task for task in tool.CHOOSING if task.name in names])
    own = {task.name: task for task in tool.TASKS}
    for task in stream.tasks:
        every = own[task.name].wordings
        kept, trained = (every[1], every[3]), (every[0], every[2], *every[4:])
        for split, wordings in (("train", trained), ("validation", kept), ("test", kept)):
            asked = [
                {**sample, "json": json.loads(sample["json"])} for sample in read_webdataset(getattr(task, split)[0])
            ]
            assert asked_in((*every, *own[task.name].held_out), asked) == set(wordings), (task.name, split)


def test_the_right_answers_score_fully_and_follow_the_instruction(samples):
    for task in Stream.load("mini_instruct").tasks:
        for split in SPLITS:
            right = []
            for sample in samples[task.name, split]:
                record = sample["json"]
                references = tuple(record.get("answers", [answer(sample)]))
                right.append(Answer(answer(sample), references, tuple(record.get("choices", ()))))
            scores = score(task.metric, right)
            assert min(scores) == max(scores) == 100 if task.metric != "cider" else min(scores) > 100
            assert all(follows_instruction(one, task.format) for one in right)


def test_yes_and_no_are_equally_frequent_for_every_thing(samples):
    for split in SPLITS:
        counts = Counter(answer(sample) for sample in samples["yes_no", split])
        assert counts["yes"] == counts["no"]
    asked = Counter()
    for sample in samples["yes_no", "train"]:
        thing = re.search(r"t-shirt|trousers|pullover|dress|coat|sandal|shirt|sneaker|bag|ankle boot", question(sample))
        asked[thing[0], answer(sample)] += 1
    assert len(asked) == 20 and set(asked.values()) == {8}


def test_the_right_flag_is_an_option_and_its_place_no_habit(samples):
    class_names = {task.name: task for task in Stream.load("mini_mtil").tasks}["country_flags"].class_names
    names = [name.lower() for name in class_names]
    for split in SPLITS:
        labels, places = read_labels(split), Counter()
        for sample in samples["which_flag", split]:
            choices = sample["json"]["choices"]
            assert len(set(choices)) == 4 and set(choices) <= set(names)
            assert answer(sample) == names[labels[sample["__key__"]]]
            assert "{}, {}, {} or {}".format(*choices) in question(sample)
            places[choices.index(answer(sample))] += 1
        assert len(places) == 4 and max(places.values()) - min(places.values()) <= 1


def read_labels(split: str) -> dict[str, int]:
    shard = ASSETS / "mini_mtil" / "country_flags" / f"{split}-000000.tar"
    return {sample["__key__"]: int(sample["cls"]) for sample in read_webdataset(shard)}


def test_baselines_are_those_of_the_most_frequent_training_answer(tool: ModuleType, capsys: pytest.CaptureFixture):
    assert tool.main(["--baselines", "mini_instruct"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "name_object: exact_match 7.1 with 'bird'" in lines  # 14 classes
    assert "read_card: exact_match 7.7 with 'ace'" in lines  # 13
    assert "yes_no: exact_match 50.0 with 'no'" in lines
    assert len(lines) == 6


def test_the_tool_writes_over_nothing(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert tool.main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message == f"error: {tmp_path} exists already; remove it or name another folder\n"
