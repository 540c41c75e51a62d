"""Loaders: the same sequence, bit for bit, for any number of ranks, workers and accumulation steps."""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from r1p_dist.data.loader import EvaluationLoader, TrainLoader, sample_order
from r1p_dist.data.shards import ShardDataset
from r1p_dist.data.stream import Task
from r1p_dist.data.transforms import evaluation_transform, train_transform
from r1p_dist.errors import InputError
from tests.data.toy_task import make_task, picture, write_tar

PREPROCESS = {"size": 8, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic"}
TRANSFORM = train_transform(PREPROCESS, True)
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
        "transform": TRANSFORM,
        "seed": 3,
        "shots": None,
        "include_validation": False,
        "workers": 0,
    }
    return TrainLoader(tasks, **(defaults | options))


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
        image, label = ShardDataset(task.train, task.class_names).read(reference_index(COUNT, seed, task.name, g))
        images.append(TRANSFORM(image, torch.Generator().manual_seed(digest("augment", seed, task.name, g))))
        labels.append(label)
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
                assert set(batch) == {"image", "label"}
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
    resumed = load([task], start_step=3, **options)
    assert len(resumed) == 4
    check_equal(list(resumed), whole[6:])
    assert list(load([task], start_step=5, **options)) == []


def test_no_sample_is_dropped_or_repeated_within_an_epoch(task: Task):
    # 11 steps of 8 are exactly 4 epochs of 22; without augmentation a picture is the same in each epoch.
    loader = load([task], iterations=11, transform=train_transform(PREPROCESS, False))
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
    assert few.read(4)[0].tobytes() == expected.read(4)[0].tobytes()


def test_joint_training_labels_the_prompts_of_all_tasks(task: Task, tmp_path: Path):
    tools = make_task(tmp_path, "tools", [1, 0, 1, 1, 0], ["saw", "axe"], first=100)
    loader = load([task, tools], iterations=1, global_batch_size=27, transform=train_transform(PREPROCESS, False))
    assert loader.prompts == [f"a photo of a {name}." for name in ("apple", "fig", "pear", "saw", "axe")]
    (batch,) = loader
    pairs = [(task, index) for index in range(22)] + [(tools, index) for index in range(5)]
    for position, joint_index in enumerate(sample_order(27, 3, "fruit+tools", 0, 27)):
        source, index = pairs[joint_index]
        image, label = ShardDataset(source.train, source.class_names).read(index)
        assert loader.prompts[batch["label"][position]] == source.prompt(label)
        assert torch.equal(batch["image"][position], evaluation_transform(PREPROCESS)(image))


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
    fixed = train_transform(PREPROCESS, False)
    lenient = {"max_bad_fraction": 0.5}
    images = {
        index: evaluation_transform(PREPROCESS)(ShardDataset([shard], "abc").read(index)[0]) for index in (0, 1, 4)
    }
    stand_in = {0: 0, 1: 1, 2: 4, 3: 4, 4: 4, 5: 0}

    for world_size in (1, 2):
        options = {"iterations": 4, "global_batch_size": 6, "world_size": world_size, "transform": fixed, **lenient}
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
    if not is_refused:
        assert len(list(loader)) == 4
        return
    with pytest.raises(InputError, match=f"task fruit: {bad_count} of 6 training pictures cannot be decoded"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_faults_reach_the_caller_as_one_line(task: Task, tmp_path: Path, workers: int):
    shard = write_tar(tmp_path / "bad.tar", [("s0.png", b"no picture"), ("s0.cls", b"0")])
    bad = replace(task, train=(shard,), test=(shard,), sizes={})
    for loader in (load([bad], workers=workers), evaluate(bad, workers=workers)):
        with pytest.raises(InputError, match="key s0: picture cannot be decoded") as caught:
            list(loader)
        assert "\n" not in str(caught.value)


def evaluate(task: Task, **options) -> EvaluationLoader:
    defaults = {"split": "test", "batch_size": 4, "rank": 0, "world_size": 1, "workers": 0}
    return EvaluationLoader(task, transform=evaluation_transform(PREPROCESS), **(defaults | options))


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
        assert torch.equal(images, torch.stack([evaluation_transform(PREPROCESS)(image) for image, _ in share]))
        assert labels.tolist() == [label for _, label in share]
        seen += len(labels)
    assert seen == 22
    assert len(lengths) == 1  # a forward pass may be collective


def test_evaluation_with_more_ranks_than_samples(task: Task):
    batches = [list(evaluate(task, split="validation", rank=rank, world_size=5)) for rank in range(5)]
    assert [len(rank) for rank in batches] == [1] * 5
    assert [len(rank[0]["label"]) for rank in batches] == [1, 1, 1, 0, 0]
    assert batches[4][0]["image"].shape == (0, 3, 8, 8)


def test_a_split_that_is_not_there(task: Task):
    with pytest.raises(InputError, match="task fruit: no validation shards"):
        evaluate(replace(task, validation=()), split="validation")
