"""Conversations: what is read from a shard, what is refused, and the loaders of instruction tasks."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from r1p_dist.data.batches import Reference
from r1p_dist.data.encoders import PictureEncoder
from r1p_dist.data.loader import EvaluationLoader, Extra, TrainLoader, evaluation_loaders, train_loader
from r1p_dist.data.order import GroupedOrder, MixtureOrder, SampleOrder
from r1p_dist.data.samples import JSON_BYTES, BadSampleError, Turn
from r1p_dist.data.shards import JointDataset, ShardDataset
from r1p_dist.data.stream import Task
from r1p_dist.errors import InputError
from r1p_dist.recipes import load_config
from tests.data.toy_conversations import Files, ToyEncoder, conversation_files, make_instructions, turns
from tests.data.toy_task import make_task, picture, write_tar

COUNT = 21


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return make_instructions(tmp_path, "charts", COUNT)


def sample_files(record: object, pictures: dict[str, bytes] | None = None) -> Files:
    """Return the files of sample k; pictures: suffix -> content."""
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    return [("k.json", text), *((f"k.{suffix}", content) for suffix, content in (pictures or {}).items())]


def read(tmp_path: Path, record: object, pictures: dict[str, bytes] | None = None):
    return ShardDataset([write_tar(tmp_path / "a.tar", sample_files(record, pictures))], None).read(0)


def decoded(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


# Samples


def test_a_conversation_is_read_with_its_picture(tmp_path: Path):
    record = {"id": 7, "conversations": turns("<image>\nWhat is this?", "A cat.", "Sure?", "Yes."), "license": "x"}
    sample = read(tmp_path, record, {"JPG": picture(1, kind="JPEG")})
    assert sample.key == "k" and sample.label is None
    assert sample.turns == (
        Turn("user", "<image>\nWhat is this?"),
        Turn("assistant", "A cat."),
        Turn("user", "Sure?"),
        Turn("assistant", "Yes."),
    )
    assert (sample.answers, sample.choices) == (("Yes.",), ())
    (image,) = sample.images
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), decoded(picture(1, kind="JPEG")))


def test_answers_choices_and_a_system_turn_are_kept(tmp_path: Path):
    system = {"from": "system", "value": "Be brief."}
    record = {"conversations": [system, *turns("Which?", "A")], "answers": ["A", "ant"], "choices": ["ant", "bee"]}
    sample = read(tmp_path, record)
    assert sample.images == ()
    assert sample.turns == (Turn("system", "Be brief."), Turn("user", "Which?"), Turn("assistant", "A"))
    assert (sample.answers, sample.choices) == (("A", "ant"), ("ant", "bee"))
    empty = read(tmp_path, {"conversations": turns("Which?", "A"), "answers": [], "choices": None})
    assert (empty.answers, empty.choices) == (("A",), ())


def test_pictures_come_in_the_order_of_their_numbers(tmp_path: Path):
    contents = {f"{number}.png": picture(number) for number in (10, 2, 0, 1, 9, 8, 7, 6, 5, 4, 3)}
    sample = read(tmp_path, {"conversations": turns("<image>" * 11 + "Compare.", "Done.")}, contents)
    assert len(sample.images) == 11
    for number, image in enumerate(sample.images):
        np.testing.assert_array_equal(np.asarray(image), decoded(picture(number)))


def test_pictures_without_a_mark_go_in_front_of_the_first_question(tmp_path: Path):
    system = {"from": "system", "value": "Be brief."}
    record = {"conversations": [system, *turns("Same?", "No.", "Why?", "Colour.")]}
    sample = read(tmp_path, record, {"0.png": picture(0), "1.webp": picture(1, kind="WEBP")})
    assert [turn.text for turn in sample.turns] == ["Be brief.", "<image>\n<image>\nSame?", "No.", "Why?", "Colour."]


GOOD = {"conversations": turns("Which?", "A")}
PAIR = {"0.png": picture(0), "1.png": picture(1)}


@pytest.mark.parametrize(
    ("record", "pictures", "message"),
    [
        (b"{", {}, "conversation is not JSON: Expecting property name"),
        (b"\xff", {}, "conversation is not JSON: "),
        (b"[" * 100_000, {}, "conversation is not JSON: "),
        (b"[1]", {}, "needs a list `conversations` with turns"),
        ({}, {}, "needs a list `conversations` with turns"),
        ({"conversations": []}, {}, "needs a list `conversations` with turns"),
        ({"conversations": ["a"]}, {}, r"turn 0: must be \{from, value\} with from one of system, human, gpt"),
        ({"conversations": [{"from": "user", "value": "a"}]}, {}, r"turn 0: must be \{from, value\} with from one of"),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, {}, r"turn 0: must be \{from, value\} with from one of"),
        ({"conversations": turns("a", " \n")}, {}, r"turn 1: value: must be text that is not empty, is ' \\n'"),
        ({"conversations": [{"from": "human"}]}, {}, "turn 0: value: must be text that is not empty, is None"),
        ({"conversations": turns("a", "\ud800")}, {}, "turn 1: value: is no Unicode text: surrogates not allowed"),
        ({"conversations": turns("a")}, {}, "turns must alternate .* they are from human"),
        ({"conversations": turns("a", "b", "c")}, {}, "turns must alternate .* they are from human, gpt, human"),
        ({"conversations": turns("a", "b")[1:]}, {}, "turns must alternate .* they are from gpt"),
        ({"conversations": turns("a", "b") + turns("c", "d")[:0:-1]}, {}, "turns must alternate .* human, gpt, gpt"),
        ({"conversations": [{"from": "system", "value": "a"}]}, {}, "turns must alternate .* they are from system"),
        (
            {"conversations": [*turns("a", "b"), {"from": "system", "value": "s"}, *turns("c")]},
            {},
            "turns must alternate .* they are from human, gpt, system, human",
        ),
        ({"conversations": turns("<image>a", "b")}, {}, "1 <image> in its human turns and 0 pictures"),
        ({"conversations": turns("<image>a", "b")}, PAIR, "1 <image> in its human turns and 2 pictures"),
        ({"conversations": turns("a", "<image>b")}, {"png": picture(0)}, "turn 1: <image> in a turn of gpt"),
        (GOOD | {"answers": "A"}, {}, "answers: must be a list of texts, is 'A'"),
        (GOOD | {"answers": ["A", 7]}, {}, r"answers\[1\]: must be text that is not empty, is 7"),
        (GOOD | {"choices": {"a": 1}}, {}, "choices: must be a list of texts, is {'a': 1}"),
        (GOOD, {"png": b"no picture"}, "picture cannot be decoded: no JPEG, PNG, WEBP file"),
        (GOOD, {"0.png": picture(0), "1.png": b"no picture"}, "picture cannot be decoded"),
        (b" " * JSON_BYTES + b"{}", {}, f"conversation of {JSON_BYTES + 2} bytes, more than {JSON_BYTES}"),
    ],
)
def test_what_is_no_conversation_is_a_bad_sample(tmp_path: Path, record: object, pictures: dict, message: str):
    dataset = ShardDataset([write_tar(tmp_path / "a.tar", sample_files(record, pictures))], None)
    with pytest.raises(BadSampleError, match=f"a.tar: key k: {message}") as caught:
        dataset.read(0)
    assert "\n" not in str(caught.value)


def test_pictures_that_are_too_large_taken_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert len(read(tmp_path, GOOD, PAIR).images) == 2
    monkeypatch.setattr("r1p_dist.data.samples._PIXELS", 20 * 14 * 2 - 1)
    with pytest.raises(BadSampleError, match="a.tar: key k: pictures too large to decode safely: over 559 pixels"):
        read(tmp_path, GOOD, PAIR)


@pytest.mark.parametrize(
    ("suffixes", "message"),
    [
        (["png"], "key k: needs a conversation (.json), has files .png"),
        (["json", "png", "jpg"], "key k: has pictures .png, .jpg; needs none, one, or .0.jpg, .1.jpg, ... without"),
        (["json", "png", "0.png"], "key k: has pictures .png, .0.png; needs"),
        (["json", "1.png", "2.png"], "key k: has pictures .1.png, .2.png; needs"),
        (["json", "2.png", "0.png"], "key k: has pictures .0.png, .2.png; needs"),
        (["json", "0.png", "0.jpg"], "key k: has pictures .0.png, .0.jpg; needs"),
    ],
)
def test_other_files_of_a_sample_are_named_at_construction(tmp_path: Path, suffixes: list[str], message: str):
    shard = write_tar(tmp_path / "a.tar", [(f"k.{suffix}", b"x") for suffix in suffixes])
    with pytest.raises(InputError) as caught:
        ShardDataset([shard], None)
    assert str(caught.value).startswith(f"{shard}: {message}")


# Data sets


def test_lengths_are_the_bytes_of_each_conversation(task: Task):
    dataset = ShardDataset(task.train, None)
    assert len(dataset) == COUNT and dataset.labels == [0] * COUNT
    expected = [len(conversation_files(i, (1, 2, 0)[i % 3])[-1][1]) for i in range(COUNT)]
    assert dataset.lengths == expected
    assert JointDataset([dataset, dataset]).lengths == expected * 2
    assert ShardDataset(task.train, None, samples=5).lengths == [
        expected[int(sample.key[1:])] for sample in map(ShardDataset(task.train, None, samples=5).read, range(5))
    ]


def test_a_samples_number_is_that_of_its_content(task: Task, tmp_path: Path):
    dataset = ShardDataset(task.train, None)
    numbers = [dataset.read(index).number for index in range(COUNT)]
    assert len(set(numbers)) == COUNT and all(0 <= number < 2**63 for number in numbers)
    moved = ShardDataset([shard.rename(tmp_path / shard.name) for shard in task.train], None)
    assert [moved.read(index).number for index in range(COUNT)] == numbers
    # Another task's shard and key may have the same names.
    other = make_instructions(tmp_path / "other", "charts", COUNT, first=100)
    assert not {ShardDataset(other.train, None).read(index).number for index in range(COUNT)} & set(numbers)


def test_samples_are_chosen_by_seed_and_key(task: Task):
    def keys(**options) -> list[str]:
        dataset = ShardDataset(task.train, None, **options)
        return [dataset.read(index).key for index in range(len(dataset))]

    chosen = keys(samples=6, seed=5)
    assert len(set(chosen)) == 6 and chosen == keys(samples=6, seed=5) == sorted(chosen)
    assert set(chosen) < set(keys(samples=7, seed=5)) and chosen != keys(samples=6, seed=6)


def test_shots_and_samples_of_the_other_kind_are_refused(task: Task, tmp_path: Path):
    with pytest.raises(
        InputError, match="train-000000.tar: shots=2 counts samples of a class, .* data.samples instead"
    ):
        ShardDataset(task.train, None, shots=2)
    for samples in (0, COUNT + 1):
        with pytest.raises(InputError, match=f"samples={samples} does not fit: there are {COUNT}; give 1 to {COUNT}"):
            ShardDataset(task.train, None, samples=samples)
    fruit = make_task(tmp_path, "fruit", [0, 1, 0], ["apple", "fig"])
    with pytest.raises(InputError, match="tar: samples=2 counts conversations, .* set data.shots instead"):
        ShardDataset(fruit.train, fruit.class_names, samples=2)


# Loaders


def train(tasks: list[Task], encoder: ToyEncoder | PictureEncoder | None = None, **options) -> TrainLoader:
    defaults = {"iterations": 6, "global_batch_size": 8, "gradient_accumulation_steps": 1, "rank": 0, "world_size": 1}
    defaults |= {"seed": 3, "shots": None, "include_validation": False, "workers": 0}
    return TrainLoader(tasks, encoder=encoder or ToyEncoder(), **(defaults | options))


def evaluate(task: Task, encoder: ToyEncoder | None = None, **options) -> EvaluationLoader:
    defaults = {"split": "test", "batch_size": 4, "rank": 0, "world_size": 1, "workers": 0}
    return EvaluationLoader(task, encoder=encoder or ToyEncoder(), **(defaults | options))


def over_ranks(world_size: int, *arguments, **options) -> list[dict[str, torch.Tensor]]:
    """Return the micro batches of all ranks together."""
    ranks = [list(train(*arguments, world_size=world_size, rank=rank, **options)) for rank in range(world_size)]
    return [
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in zip(*ranks, strict=True)
    ]


def check_equal(batches: list[dict], others: list[dict]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], other[name]) for name in batch)


def test_training_batches_are_the_encoders_with_the_samples_numbers(task: Task):
    loader = train([task])
    assert loader.prompts == []
    dataset = ShardDataset(task.train, None)
    order = SampleOrder(dataset.shard_sizes(), 3, "charts").take(0, 48)
    batches = list(loader)
    assert set(batches[0]) == {"length", "pictures", "noise", "sample"}
    samples = [dataset.read(index) for index in order]
    for name, values in {
        "sample": [sample.number for sample in samples],
        "pictures": [len(sample.images) for sample in samples],
        "length": [sum(len(turn.text) for turn in sample.turns) for sample in samples],
    }.items():
        assert torch.cat([batch[name] for batch in batches]).tolist() == values
    noise = torch.cat([batch["noise"] for batch in batches]).tolist()
    assert len(set(noise)) == 48, "each training sample has a generator of its own"


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("options", [{}, {"group_by_length": 2}, {"samples": 10}])
def test_ranks_and_workers_see_the_same_conversations(task: Task, options: dict):
    expected = over_ranks(1, [task], **options)
    check_equal(over_ranks(2, [task], **options), expected)
    check_equal(over_ranks(4, [task], workers=1, **options), expected)


def test_a_sample_that_the_encoder_refuses_is_replaced_by_the_next(task: Task):
    loader = train([task], ToyEncoder(refused=["s00004", "s00005"]), max_bad_fraction=0.5)
    dataset = ShardDataset(task.train, None)
    order = SampleOrder(dataset.shard_sizes(), 3, "charts").take(0, 48)
    expected = [dataset.read(6 if index in (4, 5) else index).number for index in order]
    assert torch.cat([batch["sample"] for batch in loader]).tolist() == expected
    assert loader.count_new_faults() == 2 and set(loader.replaced) == {
        "key s00004: has too many tokens",
        "key s00005: has too many tokens",
    }


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_steps_are_the_micro_batches_of_each_optimizer_step(task: Task, accumulation: int):
    batches = list(train([task], gradient_accumulation_steps=accumulation))
    loader = train([task], gradient_accumulation_steps=accumulation)
    steps = list(loader.steps())
    assert [len(step) for step in steps] == [accumulation] * 6
    check_equal(sum(steps, []), batches)
    loader.resume(loader.cursor(4))
    check_equal(sum(loader.steps(), []), batches[4 * accumulation :])
    loader.resume(loader.cursor(6))
    assert list(loader.steps()) == []


@pytest.mark.parametrize("accumulation", [1, 2])
def test_grouping_by_length_leaves_each_window_its_samples(task: Task, accumulation: int):
    plain = list(train([task], gradient_accumulation_steps=accumulation))
    grouped = list(train([task], gradient_accumulation_steps=accumulation, group_by_length=3))
    for half in (slice(0, 3 * accumulation), slice(3 * accumulation, 6 * accumulation)):
        own, theirs = (torch.cat([batch["sample"] for batch in batches[half]]).tolist() for batches in (grouped, plain))
        assert own != theirs and sorted(own) == sorted(theirs)
    dataset = ShardDataset(task.train, None)
    order = GroupedOrder(
        SampleOrder(dataset.shard_sizes(), 3, "charts"),
        dataset.lengths,
        8 // accumulation,
        3 * accumulation,
        3,
        "charts",
    )
    expected = [dataset.read(index).number for index in order.take(0, 48)]
    assert torch.cat([batch["sample"] for batch in grouped]).tolist() == expected


def test_joint_training_and_replay_of_conversations(task: Task, tmp_path: Path):
    signs = make_instructions(tmp_path, "signs", 6, first=50)
    joint = JointDataset([ShardDataset(task.train, None), ShardDataset(signs.train, None)])
    order = SampleOrder(joint.shard_sizes(), 3, "charts+signs").take(0, 48)
    numbers = [joint.read(index).number for index in range(len(joint))]
    loader = train([task, signs])
    assert loader.prompts == [] and len(loader.dataset) == COUNT + 6
    assert torch.cat([batch["sample"] for batch in loader]).tolist() == [numbers[index] for index in order]

    replay = train([task], extras=[Extra("replay", [signs], 0.25)])
    orders = [SampleOrder([10, 11], 3, "charts"), SampleOrder([3, 3], 3, "charts replay")]
    mixture = MixtureOrder(orders, [0.75, 0.25], 3, "charts").take(0, 48)
    assert torch.cat([batch["sample"] for batch in replay]).tolist() == [numbers[index] for index in mixture]


def test_classes_and_conversations_are_not_mixed(task: Task, tmp_path: Path):
    fruit = make_task(tmp_path, "fruit", [0, 1, 0, 1], ["apple", "fig"])
    encoder = PictureEncoder({"size": 8, "mean": (0.5,) * 3, "std": (0.2,) * 3, "interpolation": "bicubic"}, False)
    with pytest.raises(
        InputError, match="data.reference: task fruit has classes and task charts conversations; the tasks"
    ):
        train([fruit], encoder, extras=[Extra("reference", [task], 0.5)])
    with pytest.raises(InputError, match="task fruit: data.group_by_length=2 sorts conversations, .* set it to null"):
        train([fruit], encoder, group_by_length=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_has_every_conversation_once_with_its_references(task: Task, tmp_path: Path, workers: int):
    files = sum((conversation_files(i, answers=[f"a{i}", "b"], choices=["b"] * (i % 2)) for i in range(7)), [])
    task = replace(task, test=(write_tar(tmp_path / "test.tar", files),), sizes={})
    dataset = ShardDataset(task.test, None)
    seen = {}
    for rank in range(3):
        loader = evaluate(task, ToyEncoder(["s00004"]), rank=rank, world_size=3, batch_size=2, workers=workers)
        for batch in loader:
            assert "label" not in batch and type(batch["references"]) is list
            assert len(batch["references"]) == len(batch["position"])
            rows = zip(batch["position"].tolist(), batch["sample"].tolist(), batch["references"], strict=False)
            seen |= {position: (number, reference) for position, number, reference in rows}
        assert loader.left_out == ({4} if rank == 1 else set())
    assert sorted(seen) == [0, 1, 2, 3, 5, 6]
    for position, (number, reference) in seen.items():
        assert number == dataset.read(position).number
        assert reference == Reference((f"a{position}", "b"), ("b",) * (position % 2))
        assert isinstance(reference, Reference)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rank_without_a_conversation_has_the_blank_one(tmp_path: Path, workers: int):
    task = make_instructions(tmp_path, "charts", 2)
    ranks = [list(evaluate(task, rank=rank, world_size=3, workers=workers)) for rank in range(3)]
    assert [len(batches) for batches in ranks] == [1, 1, 1]
    assert [len(batches[0]["position"]) for batches in ranks] == [1, 1, 0]
    (blank,) = ranks[2]
    assert blank["references"] == [] and blank["sample"].tolist() == [-1]
    assert blank["length"].tolist() == [0] and blank["position"].dtype == torch.int64


def test_validation_samples_join_the_training_and_sizes_are_checked(task: Task, tmp_path: Path):
    extra = write_tar(tmp_path / "validation.tar", conversation_files(90) + conversation_files(91))
    assert len(train([replace(task, validation=(extra,))], include_validation=True).dataset) == COUNT + 2
    assert len(train([replace(task, sizes={"train": 5})], samples=5).dataset) == 5
    with pytest.raises(InputError, match=rf"task charts: train shards .* have {COUNT} samples, .* sizes say 5"):
        train([replace(task, sizes={"train": 5})])


def test_the_configuration_decides_samples_and_grouping(task: Task):
    settings = ["data.samples=12", "data.group_by_length=2", "train.global_batch_size=4", "seed=3"]
    loader = train_loader(load_config("mini_mtil_dac", settings), [task], 6, ToyEncoder())
    expected = train([task], global_batch_size=4, samples=12, group_by_length=2)
    check_equal(list(loader), list(expected))
    (test,) = evaluation_loaders(load_config("mini_mtil_dac", settings), [task], ToyEncoder()).values()
    assert len(test.dataset) == COUNT
    with pytest.raises(InputError, match="shots=2 counts samples of a class"):
        train_loader(load_config("mini_mtil_dac", ["data.shots=2"]), [task], 6, ToyEncoder())
