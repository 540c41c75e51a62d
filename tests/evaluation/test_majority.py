"""Majority answers, counted by hand over small shards; tests/test_build_mini_instruct.py has those of a real stream."""

import json
from pathlib import Path

import pytest

from r1p_dist.data.stream import Stream
from r1p_dist.errors import InputError
from r1p_dist.evaluation.majority import majority_baselines
from tests.data.toy_conversations import Files, conversation_files, turns
from tests.data.toy_task import write_tar


def asked(number: int, answer: str, **fields: list[str]) -> Files:
    return conversation_files(number, conversations=turns("<image>\nWhich?", answer), **fields)


def stream_of(folder: Path, metric: str = "vqa_accuracy", **splits: list[Files]) -> Stream:
    """A stream of one task with these samples; its shards have the splits' names."""
    for split, samples in splits.items():
        write_tar(folder / f"{split}.tar", sum(samples, []))
    entry = {"name": "animals", "metric": metric, **{split: [f"{split}.tar"] for split in splits}}
    (folder / "stream.yaml").write_text(json.dumps({"name": "toy", "tasks": [entry]}))
    return Stream.load(folder)


def test_the_most_frequent_training_answer_is_scored_on_the_other_split(tmp_path: Path) -> None:
    stream = stream_of(
        tmp_path,
        train=[asked(number, answer) for number, answer in enumerate(["dog", "cat", "cow", "cat", "dog"])],
        validation=[asked(0, "cat"), asked(1, "dog")],
        # One human of three said cat, then all did.
        test=[asked(0, "dog", answers=["dog", "dog", "cat"]), asked(1, "cat"), asked(2, "cow")],
    )
    assert majority_baselines(stream) == {"animals": ("cat", pytest.approx((100 / 3 + 100 + 0) / 3))}
    assert majority_baselines(stream, "validation") == {"animals": ("cat", 50.0)}


def test_of_choices_the_most_frequent_place_counts(tmp_path: Path) -> None:
    choices = {"choices": ["dog", "cat", "cow"]}
    stream = stream_of(
        tmp_path,
        metric="multiple_choice",
        train=[asked(0, "cat", **choices), asked(1, "B", **choices), asked(2, "cat", choices=["cat", "dog"])],
        test=[asked(0, "cow", choices=["dog", "cow"]), asked(1, "A", **choices)],
    )
    assert majority_baselines(stream) == {"animals": ("B", 50.0)}


def test_conversations_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    broken = [("s00009.json", b"{")]
    stream = stream_of(tmp_path, train=[asked(0, "dog"), broken], test=[broken, asked(1, "dog")])
    assert majority_baselines(stream) == {"animals": ("dog", 100.0)}
    empty = stream_of(tmp_path, train=[broken], test=[asked(1, "dog")])
    with pytest.raises(InputError, match="stream.yaml: task animals: no conversation in its shards .*train.tar"):
        majority_baselines(empty)
