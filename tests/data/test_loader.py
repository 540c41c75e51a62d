"""Loaders: the same sequence, bit for bit, for any number of ranks, workers and accumulation steps."""

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from r1p_dist.data.encoders import PictureEncoder
from r1p_dist.data.loader import EvaluationLoader, Extra, TrainLoader, evaluation_loaders, train_loader
from r1p_dist.data.order import SampleOrder
from r1p_dist.data.shards import ShardDataset
from r1p_dist.data.stream import Task
from r1p_dist.data.transforms import evaluation_transform, train_transform
from r1p_dist.errors import InputError
from r1p_dist.recipes import load_config
from tests.data.toy_task import make_task, picture, write_tar

PREPROCESS = {"size": 8, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic"}
TRANSFORM = train_transform(PREPROCESS, True)
AUGMENTING, FIXED = (PictureEncoder(PREPROCESS, augment) for augment in (True, False))
COUNT = 22


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return make_task(tmp_path, "fruit", [index % 3 for index in range(COUNT)], ["apple", "fig", "pear"])


def load(tasks: list[Task], **options) -> TrainLoader:
    defaults = {
        "iterations": 5,
        "global_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "rank": 0,
        "world_size": 1,
        "encoder": AUGMENTING,
        "seed": 3,
        "shots": None,
        "include_validation": False,
        "workers": 0,
    }
    return TrainLoader(tasks, **(defaults | options))


def sample_order(n: int, seed: int, task: str, start: int, stop: int) -> list[int]:
    return SampleOrder([n], seed, task).take(start, stop)


def digest(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "little")


def reference_index(n: int, seed: int, task: str, g: int) -> int:
    """perm(seed, task, g // n)[g mod n], written out with Python's own sort."""
    raw = [int(np.random.PCG64(digest("order", seed, task, g // n)).random_raw(n)[i]) for i in range(n)]
    return sorted(range(n), key=lambda i: raw[i])[g % n]


def reference_samples(task: Task, seed: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples start .. stop - 1 of a task, each from its own dataset, generator and transform call."""
    images, labels = [], []
    for g in range(start, stop):
        sample = ShardDataset(task.train, task.class_names).read(reference_index(COUNT, seed, task.name, g))
        generator = torch.Generator().manual_seed(digest("augment", seed, task.name, g))
        images.append(TRANSFORM(sample.images[0], generator))
        labels.append(sample.label)
    return torch.stack(images), torch.tensor(labels)


def test_the_order_is_one_permutation_per_epoch():
    n = 22
    order = sample_order(n, 3, "fruit", 0, 4 * n)
    assert order == [reference_index(n, 3, "fruit", g) for g in range(4 * n)]
    epochs = [order[start : start + n] for start in range(0, 4 * n, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert sample_order(n, 3, "fruit", 17, 50) == order[17:50]
    assert sample_order(n, 3, "fruit", 5, 5) == []
    assert sample_order(n, 4, "fruit", 0, n) != epochs[0] != sample_order(n, 3, "tools", 0, n)


def test_the_order_never_changes():
    # Written down once: a run that is resumed with a later release must go on with the same samples.
    assert sample_order(8, 0, "fashion", 6, 12) == [3, 5, 3, 5, 1, 0]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_ranks_and_workers_see_the_same_sequence(task: Task, world_size: int, accumulation: int):
    images, labels = reference_samples(task, 3, 0, 40)  # almost two epochs: batches straddle the seam
    micro = 8 // accumulation
    share = micro // world_size
    for workers in (0, 2) if world_size == 2 else (0,):
        for rank in range(world_size):
            options = {"gradient_accumulation_steps": accumulation, "world_size": world_size, "rank": rank}
            loader = load([task], workers=workers, **options)
            batches = list(loader)
            assert len(batches) == len(loader) == 5 * accumulation
            assert loader.micro_batch_size == share
            for number, batch in enumerate(batches):
                start = number * micro + rank * share
                assert set(batch) == {"image", "label", "sample"}
                assert batch["image"].dtype == torch.float32 and batch["label"].dtype == torch.int64
                assert torch.equal(batch["image"], images[start : start + share])
                assert torch.equal(batch["label"], labels[start : start + share])


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 2), (4, 1)])
def test_workers_do_not_change_the_sequence(task: Task, world_size: int, accumulation: int):
    options = {"world_size": world_size, "rank": world_size - 1, "gradient_accumulation_steps": accumulation}
    here, there = (list(load([task], workers=workers, **options)) for workers in (0, 2))
    check_equal(here, there)


def check_equal(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_at_the_next_sample(task: Task, workers: int):
    options = {"gradient_accumulation_steps": 2, "workers": workers, "world_size": 2, "rank": 1}
    whole = list(load([task], **options))
    resumed = load([task], **options)
    resumed.resume(resumed.cursor(3))
    assert len(resumed) == 4
    check_equal(list(resumed), whole[6:])
    resumed.resume(resumed.cursor(5))
    assert list(resumed) == []


def test_no_sample_is_dropped_or_repeated_within_an_epoch(task: Task):
    # 11 steps of 8 are exactly 4 epochs of 22; without augmentation a picture is the same in each epoch.
    loader = load([task], iterations=11, encoder=FIXED)
    images = torch.cat([batch["image"] for batch in loader])
    counts = torch.unique(images.flatten(1), dim=0, return_counts=True)[1]
    assert counts.tolist() == [4] * 22


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_random_state_alone(task: Task, workers: int):
    before = torch.get_rng_state()
    list(load([task], iterations=2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_workers_no_process_is_started(task: Task, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("torch.utils.data.DataLoader")
    assert len(list(load([task]))) == 5


def test_shots_and_validation_choose_the_samples(task: Task):
    assert len(load([task]).dataset) == 22
    assert len(load([task], include_validation=True).dataset) == 25
    assert len(load([replace(task, validation=())], include_validation=True).dataset) == 22
    expected = ShardDataset(task.train, task.class_names, shots=2, seed=3)
    few = load([task], shots=2).dataset
    assert few.labels == expected.labels and len(few) == 6
    assert few.read(4).images[0].tobytes() == expected.read(4).images[0].tobytes()


def test_joint_training_labels_the_prompts_of_all_tasks(task: Task, tmp_path: Path):
    tools = make_task(tmp_path, "tools", [1, 0, 1, 1, 0], ["saw", "axe"], first=100)
    loader = load([task, tools], iterations=1, global_batch_size=27, encoder=FIXED)
    assert loader.prompts == [f"a photo of a {name}." for name in ("apple", "fig", "pear", "saw", "axe")]
    (batch,) = loader
    pairs = [(task, index) for index in range(22)] + [(tools, index) for index in range(5)]
    for position, joint_index in enumerate(sample_order(27, 3, "fruit+tools", 0, 27)):
        source, index = pairs[joint_index]
        sample = ShardDataset(source.train, source.class_names).read(index)
        assert loader.prompts[batch["label"][position]] == source.prompt(sample.label)
        assert torch.equal(batch["image"][position], evaluation_transform(PREPROCESS)(sample.images[0]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"global_batch_size": 10, "world_size": 4},
            ["train.global_batch_size=10", "world_size=4", "train.global_batch_size=8"],
        ),
        (
            {"global_batch_size": 9, "gradient_accumulation_steps": 2},
            ["train.global_batch_size=9", "train.gradient_accumulation_steps=2", "world_size=1"],
        ),
        (
            {"global_batch_size": 12, "gradient_accumulation_steps": 4, "world_size": 2},
            ["train.global_batch_size=12", "steps=4", "world_size=2", "train.global_batch_size=8"],
        ),
        ({"global_batch_size": 2, "world_size": 4}, ["train.global_batch_size=2", "train.global_batch_size=4"]),
    ],
)
def test_batch_sizes_that_do_not_divide(task: Task, options: dict, words: list[str]):
    with pytest.raises(InputError) as caught:
        load([task], **options)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_sizes_other_than_the_stream_file_says(task: Task):
    wrong = replace(task, sizes={"train": 23, "validation": 3, "test": 21})
    with pytest.raises(InputError, match="task fruit: train shards .* have 22 samples.* 23"):
        load([wrong])
    with pytest.raises(InputError, match="task fruit: test shards .* have 22 samples.* 21"):
        evaluate(wrong)
    assert len(load([wrong], shots=2).dataset) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_picture_is_replaced_by_the_next_alike_on_all_world_sizes(
    task: Task, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
):
    files = []
    for index in range(6):
        content = picture(index) if index not in (2, 3, 5) else b"no picture"
        files += [(f"s{index}.png", content), (f"s{index}.cls", str(index % 3).encode())]
    shard = write_tar(tmp_path / "bad.tar", files)
    bad = replace(task, train=(shard,), sizes={})
    lenient = {"max_bad_fraction": 0.5}
    images = {
        index: evaluation_transform(PREPROCESS)(ShardDataset([shard], "abc").read(index).images[0])
        for index in (0, 1, 4)
    }
    stand_in = {0: 0, 1: 1, 2: 4, 3: 4, 4: 4, 5: 0}

    for world_size in (1, 2):
        options = {"iterations": 4, "global_batch_size": 6, "world_size": world_size, "encoder": FIXED, **lenient}
        with caplog.at_level(logging.WARNING, "r1p_dist.data.loader"):
            loaders = [load([bad], rank=rank, workers=workers, **options) for rank in range(world_size)]
            ranks = [list(loader) for loader in loaders]
        for number in range(4):
            seen = torch.cat([rank[number]["image"] for rank in ranks])
            labels = torch.cat([rank[number]["label"] for rank in ranks])
            order = sample_order(6, 3, "fruit", 6 * number, 6 * number + 6)
            assert torch.equal(seen, torch.stack([images[stand_in[index]] for index in order]))
            assert labels.tolist() == [stand_in[index] % 3 for index in order]
        counted = {}
        for loader in loaders:
            for message, times in loader.replaced.items():
                key = message.split("key ")[1][:2]
                counted[key] = counted.get(key, 0) + times
        # s2's stand-in s3 is bad as well, so that s3 is met twice per epoch.
        assert counted == {"s2": 4, "s3": 8, "s5": 4}
    assert "key s2" in caplog.text and "the next sample takes its place" in caplog.text


@pytest.mark.parametrize(
    ("bad_count", "fraction", "is_refused"), [(1, None, False), (2, None, True), (2, 0.34, False), (1, 0.0, True)]
)
def test_too_many_bad_pictures_end_the_run(task: Task, tmp_path: Path, bad_count: int, fraction, is_refused: bool):
    files = []
    for index in range(6):
        content = b"no picture" if index < bad_count else picture(index)
        files += [(f"s{index}.png", content), (f"s{index}.cls", str(index % 3).encode())]
    bad = replace(task, train=(write_tar(tmp_path / "bad.tar", files),), sizes={})
    loader = load([bad], iterations=4, global_batch_size=6, max_bad_fraction=fraction)
    assert len(list(loader)) == 4
    assert loader.count_new_faults() == bad_count and loader.count_new_faults() == 0
    if not is_refused:
        loader.check_faults()
        assert loader.bad_samples == bad_count
        return
    with pytest.raises(InputError, match=f"task fruit: {bad_count} of 6 training samples cannot be used"):
        loader.check_faults()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_of_the_data_reaches_the_caller_as_one_line(task: Task, tmp_path: Path, workers: int):
    shard = write_tar(tmp_path / "bad.tar", [("s0.png", b"no picture"), ("s0.cls", b"0")])
    loader = load([replace(task, train=(shard,), sizes={})], workers=workers)
    with pytest.raises(InputError, match="no training sample can be used; .* key s0: picture cannot") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_leaves_bad_pictures_out_and_keeps_the_others_places(
    task: Task, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
):
    files = []
    for index in range(7):
        content = b"no picture" if index in (1, 4) else picture(index)
        files += [(f"s{index}.png", content), (f"s{index}.cls", str(index % 3).encode())]
    bad = replace(task, test=(write_tar(tmp_path / "bad.tar", files),), sizes={})
    transform = evaluation_transform(PREPROCESS)
    seen, left_out, counts = {}, set(), set()
    with caplog.at_level(logging.WARNING, "r1p_dist.data.loader"):
        for rank in range(3):
            loader = evaluate(bad, rank=rank, world_size=3, batch_size=1, workers=workers)
            batches = list(loader)
            counts.add(len(batches))
            left_out |= loader.left_out
            for batch in batches:
                for image, label, position in zip(batch["image"], batch["label"], batch["position"], strict=True):
                    assert int(position) not in seen
                    seen[int(position)] = (image, int(label))
    assert counts == {3}, "every rank does as many forward passes"
    assert sorted(seen) == [0, 2, 3, 5, 6] and left_out == {1, 4}
    reference = ShardDataset(bad.test, bad.class_names)
    for position, (image, label) in seen.items():
        expected = reference.read(position)
        assert torch.equal(image, transform(expected.images[0])) and label == expected.label
    assert "key s4" in caplog.text and "left out of the evaluation" in caplog.text


def evaluate(task: Task, **options) -> EvaluationLoader:
    defaults = {"split": "test", "batch_size": 4, "rank": 0, "world_size": 1, "workers": 0}
    return EvaluationLoader(task, encoder=FIXED, **(defaults | options))


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (3, 0), (3, 1), (5, 0)])
def test_evaluation_has_each_sample_once_over_all_ranks(task: Task, world_size: int, workers: int):
    dataset = ShardDataset(task.test, task.class_names)
    seen = 0
    lengths = set()
    for rank in range(world_size):
        loader = evaluate(task, rank=rank, world_size=world_size, workers=workers)
        batches = list(loader)
        lengths |= {len(batches), len(loader)}
        assert all(1 <= len(batch["label"]) <= 4 for batch in batches)
        images = torch.cat([batch["image"] for batch in batches])
        labels = torch.cat([batch["label"] for batch in batches])
        share = [dataset.read(index) for index in range(rank, 22, world_size)]
        assert torch.equal(images, torch.stack([evaluation_transform(PREPROCESS)(s.images[0]) for s in share]))
        assert labels.tolist() == [sample.label for sample in share]
        seen += len(labels)
    assert seen == 22
    assert len(lengths) == 1  # a forward pass may be collective


def test_evaluation_with_more_ranks_than_samples(task: Task):
    batches = [list(evaluate(task, split="validation", rank=rank, world_size=5)) for rank in range(5)]
    assert [len(rank) for rank in batches] == [1] * 5
    assert [len(rank[0]["label"]) for rank in batches] == [1, 1, 1, 0, 0]
    assert batches[4][0]["image"].shape == (0, 3, 8, 8)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [None, 2])
def test_any_ranks_and_workers_see_every_sample_once(task: Task, world_size: int, workers: int, window: int | None):
    # 11 steps of 12 are 6 epochs of 22.
    seen = [[] for _ in range(11)]
    for rank in range(world_size):
        loader = load(
            [task],
            iterations=11,
            global_batch_size=12,
            world_size=world_size,
            rank=rank,
            workers=workers,
            shuffle_shards=window,
            encoder=FIXED,
        )
        batches = list(loader)
        assert len(batches) == 11
        for number, batch in enumerate(batches):
            seen[number] += [image.numpy().tobytes() for image in batch["image"]]
    sequence = sum(seen, [])
    transform = evaluation_transform(PREPROCESS)
    everything = ShardDataset(task.train, task.class_names)
    pixels = [transform(everything.read(index).images[0]).numpy().tobytes() for index in range(COUNT)]
    assert len(set(pixels)) == COUNT
    for epoch in range(6):
        assert sorted(sequence[COUNT * epoch : COUNT * (epoch + 1)]) == sorted(pixels)
    sizes = everything.shard_sizes()
    assert sequence == [pixels[index] for index in SampleOrder(sizes, 3, "fruit", window).take(0, 11 * 12)]


@pytest.mark.parametrize("window", [None, 2])
def test_a_cursor_of_two_ranks_goes_on_with_three_in_the_middle_of_an_epoch(task: Task, window: int | None):
    def run(world_size: int, cursor: dict | None = None) -> list[dict]:
        ranks = []
        for rank in range(world_size):
            loader = load([task], global_batch_size=6, world_size=world_size, rank=rank, shuffle_shards=window)
            if cursor:
                loader.resume(cursor)
            ranks.append(list(loader))
        return [
            {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
            for batches in zip(*ranks, strict=True)
        ]

    undisturbed = run(1)
    cursor = json.loads(json.dumps(load([task], global_batch_size=6, world_size=2).cursor(2)))
    check_equal(run(2)[:2], undisturbed[:2])
    check_equal(run(3, cursor), undisturbed[2:])


def test_a_cursor_that_does_not_fit_is_refused(task: Task, tmp_path: Path):
    cursor = load([task]).cursor(3)
    other = make_task(tmp_path, "other", [index % 3 for index in range(COUNT)], task.class_names)
    changed = write_tar(tmp_path / "changed.tar", [("z.png", picture(1)), ("z.cls", b"1")])
    load([replace(other, name="fruit")]).resume(cursor)  # the same keys and labels are the same samples
    with pytest.raises(InputError, match="task fruit: its training samples are not those that the run began with"):
        load([replace(task, train=(*task.train, changed), sizes={})]).resume(cursor)
    with pytest.raises(InputError, match="24 samples are done, which is no number of whole steps of .*size=10"):
        load([task], global_batch_size=10).resume(cursor)


def test_replay_has_its_share_of_every_block_and_its_own_order(task: Task, tmp_path: Path):
    tools = make_task(tmp_path, "tools", [1, 0, 1, 1, 0], ["saw", "axe"], first=100)
    birds = make_task(tmp_path, "birds", [0, 1, 0], ["owl", "tit"], first=200)
    extras = [Extra("replay", [tools, birds], 0.25)]
    ranks = [
        list(load([task], extras=extras, iterations=10, world_size=2, rank=rank, encoder=FIXED)) for rank in (0, 1)
    ]
    batches = [torch.cat([one["label"], other["label"]]) for one, other in zip(*ranks, strict=True)]
    images = torch.cat([torch.cat([one["image"], other["image"]]) for one, other in zip(*ranks, strict=True)])
    labels = torch.cat(batches).tolist()
    assert all(sum(label >= 3 for label in batch.tolist()) == 2 for batch in batches), "2 of 8"
    # Both parts go through their own permutation, epoch after epoch.
    past = [(tools, index) for index in range(5)] + [(birds, index) for index in range(3)]
    own_order = iter(sample_order(COUNT, 3, "fruit", 0, 60))
    past_order = iter(sample_order(8, 3, "fruit replay", 0, 20))
    prompts = load([task], extras=extras).prompts
    assert [prompt.split()[-1] for prompt in prompts] == ["apple.", "fig.", "pear.", "saw.", "axe.", "owl.", "tit."]
    for image, label in zip(images, labels, strict=True):
        source, index = past[next(past_order)] if label >= 3 else (task, next(own_order))
        expected = ShardDataset(source.train, source.class_names).read(index)
        assert prompts[label] == source.prompt(expected.label)
        assert torch.equal(image, evaluation_transform(PREPROCESS)(expected.images[0]))
    places = [[position for position, label in enumerate(batch.tolist()) if label >= 3] for batch in batches]
    assert len({tuple(place) for place in places}) > 3, "at random places of a block"


def pixels_of(shards: tuple[Path, ...], class_names: tuple[str, ...]) -> list[bytes]:
    data, transform = ShardDataset(shards, class_names), evaluation_transform(PREPROCESS)
    return [transform(data.read(index).images[0]).numpy().tobytes() for index in range(len(data))]


@pytest.mark.parametrize("evaluate_on", ["test", "validation"])
def test_what_is_scored_is_never_trained_on(task: Task, tmp_path: Path, evaluate_on: str):
    other = make_task(tmp_path, "other", [index % 3 for index in range(7)], task.class_names, first=50)
    task = replace(task, test=other.train, sizes={})
    pixels = {split: pixels_of(getattr(task, split), task.class_names) for split in ("train", "validation", "test")}
    sizes = ["train.global_batch_size=5", "evaluation.batch_size=4"]
    config = load_config("mini_mtil_dac", [f"data.evaluate_on={evaluate_on}", *sizes])

    def seen(loader: TrainLoader | EvaluationLoader) -> list[bytes]:
        return sorted(image.numpy().tobytes() for batch in loader for image in batch["image"])

    if evaluate_on == "test":
        assert seen(train_loader(config, [task], 5, FIXED)) == sorted(pixels["train"] + pixels["validation"])
    else:
        assert set(seen(train_loader(config, [task], 5, FIXED))) == set(pixels["train"])
    for encoder in (FIXED, AUGMENTING):  # that of the training, too, crops nothing here
        assert seen(evaluation_loaders(config, [task], encoder)["fruit"]) == sorted(pixels[evaluate_on])


def test_replay_and_reference_each_have_their_own_share(task: Task, tmp_path: Path):
    tools = make_task(tmp_path, "tools", [1, 0, 1, 1, 0], ["saw", "axe"], first=100)
    birds = make_task(tmp_path, "birds", [0, 1, 0], ["owl", "tit"], first=200)
    shares = ["data.replay_share=0.25", "data.reference_share=0.125", "data.reference=birds"]
    config = load_config("mini_mtil_dac", ["train.global_batch_size=8", *shares])
    loader = train_loader(config, [task], 6, FIXED, past=[tools], reference=[birds])
    for batch in loader:
        names = [loader.prompts[label].removesuffix(".").split()[-1] for label in batch["label"]]
        counted = [sum(name in task.class_names for name in names) for task in (task, tools, birds)]
        assert counted == [5, 2, 1]
    # a first stage has no past, and its own samples stand in for what replay would have
    for batch in train_loader(config, [task], 6, FIXED, past=[], reference=[birds]):
        assert (batch["label"] < len(task.class_names)).sum() == 7


def test_a_split_that_is_not_there(task: Task):
    with pytest.raises(InputError, match="task fruit: no validation shards"):
        evaluate(replace(task, validation=()), split="validation")
