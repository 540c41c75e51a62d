"""Batches of a task in an exact order: a function of seed, task and step, whatever the number of ranks and workers.

Sample g of a task is what `order` says; batches straddle epochs, and a run that is resumed goes on at the next g.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from r1p_dist.config import RunConfig
from r1p_dist.data.order import MixtureOrder, SampleOrder, digest_number
from r1p_dist.data.remote import ShardCache
from r1p_dist.data.samples import BadSampleError
from r1p_dist.data.shards import JointDataset, ShardDataset
from r1p_dist.data.stream import Task
from r1p_dist.data.transforms import EvaluationTransform, TrainTransform, evaluation_transform, train_transform
from r1p_dist.distributed import rank, sum_over_ranks, world_size
from r1p_dist.errors import InputError

Batch = dict[str, torch.Tensor]
_Faults = list[tuple[int, str]]  # (sample of the data set, reason)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extra:
    """Tasks mixed into a stage's training, for replay or as a reference; share: of the samples, above 0."""

    name: str
    tasks: Sequence[Task]
    share: float


class TrainLoader:
    """The training micro batches of one rank, for one task or for several at once (joint training, replay).

    Yields {"image": (n, 3, H, W) float32, "label": (n,) int64}; `label` indexes `prompts`, which has the training
    prompt of each class of each task. A sample that cannot be used is replaced by the next one of the data set, is
    logged and counted in `replaced` (message -> times). `check_faults` compares those of all ranks with
    `max_bad_fraction`, so that all ranks end together; `bad_samples` is how many there were at the last check.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        iterations: int,
        global_batch_size: int,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        transform: TrainTransform,
        seed: int,
        shots: int | None,
        include_validation: bool,
        workers: int,
        extras: Sequence[Extra] = (),
        shuffle_shards: int | None = None,
        max_bad_fraction: float | None = None,
        cache: ShardCache | None = None,
    ) -> None:
        """Index the training shards; shuffle_shards: how many shards' samples are mixed, None: the whole epoch's.

        InputError: batch sizes that do not divide, unusable shards, sizes other than the stream file says.
        """
        share = _micro_batch_size(global_batch_size, gradient_accumulation_steps, world_size)
        splits = ("train", "validation") if include_validation else ("train",)
        groups = [tasks, *(extra.tasks for extra in extras)]
        joint = [JointDataset([_load_dataset(task, splits, shots, seed, cache) for task in group]) for group in groups]
        self.dataset = joint[0] if not extras else JointDataset([part for whole in joint for part in whole.datasets])
        self.prompts = [
            task.prompt(label) for group in groups for task in group for label in range(len(task.class_names))
        ]
        self.micro_batch_size = share
        self.replaced: Counter[str] = Counter()
        self.bad_samples = self._known_bad = 0
        self._bad: set[int] = set()
        self.name = "+".join(task.name for task in tasks)
        self._most_bad = max(1, len(self.dataset) // 1000)
        if max_bad_fraction is not None:
            self._most_bad = int(max_bad_fraction * len(self.dataset))
        self._workers = workers
        self._micro_batches = range(iterations * gradient_accumulation_steps)
        self._global_batch_size, self._accumulation = global_batch_size, gradient_accumulation_steps
        names = [self.name, *(f"{self.name} {extra.name}" for extra in extras)]
        orders = [
            SampleOrder(part.shard_sizes(), seed, name, shuffle_shards) for part, name in zip(joint, names, strict=True)
        ]
        order: SampleOrder | MixtureOrder = orders[0]
        if extras:
            shares = [extra.share for extra in extras]
            order = MixtureOrder(orders, [1 - sum(shares), *shares], seed, self.name)
        self._batches = _TrainBatches(self.dataset, order, transform, seed, self.name, share, rank, world_size)

    def __len__(self) -> int:
        return len(self._micro_batches)

    @cached_property
    def _fingerprint(self) -> str:
        return self.dataset.fingerprint()

    def cursor(self, step: int) -> dict[str, Any]:
        """Return where the data stands after `step` optimizer steps; it says nothing of ranks and workers.

        The bad samples are those of all ranks at the last `check_faults`, and this rank's.
        """
        return {
            "next_sample": step * self._global_batch_size,
            "dataset": self._fingerprint,
            "bad": sorted(self._bad),
        }

    def resume(self, cursor: dict[str, Any]) -> None:
        """Go on at a cursor, of any number of ranks. InputError: of other data, or not between two steps."""
        if cursor["dataset"] != self._fingerprint:
            raise InputError(f"task {self.name}: its training samples are not those that the run began with")
        step, rest = divmod(cursor["next_sample"], self._global_batch_size)
        if rest:
            raise InputError(
                f"task {self.name}: {cursor['next_sample']} samples are done, which is no number of whole steps of "
                f"train.global_batch_size={self._global_batch_size}; keep the one that the run began with"
            )
        self._micro_batches = range(step * self._accumulation, self._micro_batches.stop)
        self._bad = set(cursor["bad"])
        self.bad_samples = self._known_bad = len(self._bad)

    def __iter__(self) -> Iterator[Batch]:
        for batch, faults in _iterate(self._batches, self._micro_batches, self._workers):
            for index, fault in faults:
                if index not in self._bad:
                    _logger.warning("%s; the next sample takes its place", fault)
                    self._bad.add(index)
                self.replaced[fault] += 1
            yield batch

    def count_new_faults(self) -> int:
        """Return how many samples turned out to be bad on this rank since the last call."""
        known, self._known_bad = self._known_bad, len(self._bad)
        return self._known_bad - known

    def check_faults(self) -> None:
        """Compare the bad samples of all ranks, together, with what is allowed; collective. InputError: too many."""
        bad = torch.zeros(len(self.dataset), dtype=torch.int32)
        bad[sorted(self._bad)] = 1
        self._bad = set(sum_over_ranks(bad).nonzero().flatten().tolist())
        self.bad_samples = self._known_bad = len(self._bad)  # ranks meet the same one in different epochs
        if self.bad_samples > self._most_bad:
            example = f"; one of them: {next(iter(self.replaced))}" if self.replaced else ""
            raise InputError(
                f"task {self.name}: {self.bad_samples} of {len(self.dataset)} training samples cannot be used and "
                f"{self._most_bad} may; mend them or set data.max_bad_fraction{example}"
            )


class EvaluationLoader:
    """One rank's share of a task's split: the samples rank, rank + world_size, ..., each once, none padded.

    Yields {"image": (n, 3, H, W) float32, "label": (n,) int64, "position": (n,) int64, the sample's number}. A sample
    that cannot be used is left out, logged, and kept by its number in `left_out`. All ranks yield equally many
    batches, because a forward pass under ZeRO-3 is collective: shares are cut as evenly as possible into batches of at
    most `batch_size`, and one without any sample has n = 0.
    """

    def __init__(
        self,
        task: Task,
        *,
        split: str,
        batch_size: int,
        rank: int,
        world_size: int,
        transform: EvaluationTransform,
        workers: int,
        cache: ShardCache | None = None,
    ) -> None:
        """Index the shards of `split`. InputError: no such split, unusable shards, sizes other than the stream says."""
        self.dataset = _load_dataset(task, (split,), None, 0, cache)
        self.left_out: set[int] = set()
        batch_count = math.ceil(math.ceil(len(self.dataset) / world_size) / batch_size)
        share = np.array_split(np.arange(rank, len(self.dataset), world_size), batch_count)
        self._batches = _EvaluationBatches(self.dataset, transform, [indices.tolist() for indices in share])
        self._workers = workers

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch, faults in _iterate(self._batches, range(len(self._batches)), self._workers):
            for index, fault in faults:
                if index not in self.left_out:
                    _logger.warning("%s; it is left out of the evaluation", fault)
                    self.left_out.add(index)
            yield batch


def train_loader(
    config: RunConfig,
    tasks: Sequence[Task],
    iterations: int,
    preprocess: dict[str, Any],
    past: Sequence[Task] = (),
    reference: Sequence[Task] = (),
) -> TrainLoader:
    """Return this rank's training loader; a run that is scored on the test split trains on the validation split too.

    past: the tasks that were trained before, for data.replay_share. reference: those of data.reference.
    """
    data = config.data
    extras = [Extra("replay", past, data.replay_share), Extra("reference", reference, data.reference_share)]
    return TrainLoader(
        tasks,
        iterations=iterations,
        global_batch_size=config.train.global_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        rank=rank(),
        world_size=world_size(),
        transform=train_transform(preprocess, data.augment),
        seed=config.seed,
        shots=data.shots,
        include_validation=data.evaluate_on == "test",
        workers=data.workers,
        extras=[extra for extra in extras if extra.tasks and extra.share],
        shuffle_shards=data.shuffle_shards,
        max_bad_fraction=data.max_bad_fraction,
        cache=_cache(config),
    )


def evaluation_loaders(
    config: RunConfig, tasks: Sequence[Task], preprocess: dict[str, Any]
) -> dict[str, EvaluationLoader]:
    """Return task name -> this rank's loader of the split that the run is scored on."""
    transform = evaluation_transform(preprocess)
    return {
        task.name: EvaluationLoader(
            task,
            split=config.data.evaluate_on,
            batch_size=config.evaluation.batch_size,
            rank=rank(),
            world_size=world_size(),
            transform=transform,
            workers=config.data.workers,
            cache=_cache(config),
        )
        for task in tasks
    }


def _cache(config: RunConfig) -> ShardCache:
    limit = config.data.cache_gb
    return ShardCache(config.data.cache_dir, None if limit is None else int(limit * 1e9))


def _micro_batch_size(global_batch_size: int, gradient_accumulation_steps: int, world_size: int) -> int:
    """Return the samples per rank and micro batch."""
    parts = gradient_accumulation_steps * world_size
    if global_batch_size % parts:
        nearest = max(parts, global_batch_size // parts * parts)
        raise InputError(
            f"train.global_batch_size={global_batch_size} is not divisible by train.gradient_accumulation_steps="
            f"{gradient_accumulation_steps} times world_size={world_size}; set train.global_batch_size={nearest}, "
            "or change the other two"
        )
    return global_batch_size // parts


def _load_dataset(
    task: Task, splits: Sequence[str], shots: int | None, seed: int, cache: ShardCache | None
) -> ShardDataset:
    shards = [shard for split in splits for shard in getattr(task, split)]
    if not shards:
        raise InputError(f"task {task.name}: no {splits[0]} shards in the stream file; add them or use another split")
    dataset = ShardDataset(shards, task.class_names, shots=shots, seed=seed, cache=cache)
    used = [split for split in splits if getattr(task, split)]
    # A shard that was forgotten in the list would go unseen otherwise.
    if shots is None and all(split in task.sizes for split in used):
        expected = sum(task.sizes[split] for split in used)
        if len(dataset) != expected:
            raise InputError(
                f"task {task.name}: {' + '.join(used)} shards ({shards[0]} ...) have {len(dataset)} samples, "
                f"the stream file's sizes say {expected}; correct its list of shards or its sizes"
            )
    return dataset


def _iterate(batches: torch.utils.data.Dataset, numbers: range, workers: int) -> Iterator[tuple[Batch, _Faults]]:
    """Yield batches[number] for each number in order, read ahead by `workers` processes (0: in this one)."""
    if workers == 0:
        results: Iterable = (batches[number] for number in numbers)
    else:
        # Its own generator: the DataLoader would draw from the global one, and dropout would depend on `workers`.
        results = torch.utils.data.DataLoader(
            batches, batch_size=None, sampler=numbers, num_workers=workers, generator=torch.Generator()
        )
    for result in results:
        # As a value, for a DataLoader would wrap the one-line message into the worker's traceback.
        if isinstance(result, InputError):
            raise result
        yield result


class _TrainBatches(torch.utils.data.Dataset):
    """Micro batch number -> (batch of this rank, faults), or the InputError that prevents it."""

    def __init__(
        self,
        dataset: JointDataset,
        order: SampleOrder | MixtureOrder,
        transform: TrainTransform,
        seed: int,
        name: str,
        share: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.dataset, self.order, self.transform, self.seed, self.name = dataset, order, transform, seed, name
        self.share, self.rank, self.world_size = share, rank, world_size
        self._ahead: list[int] = []

    def __getitem__(self, number: int) -> tuple[Batch, _Faults] | InputError:
        start = (number * self.world_size + self.rank) * self.share
        faults: _Faults = []
        images, labels = [], []
        try:
            for sample, index in enumerate(self.order.take(start, start + self.share), start):
                image, label = self._read(index, faults)
                generator = torch.Generator().manual_seed(digest_number("augment", self.seed, self.name, sample))
                images.append(self.transform(image, generator))
                labels.append(label)
            self._fetch_ahead(start)
        except InputError as error:
            return error
        return {"image": torch.stack(images), "label": torch.tensor(labels)}, faults

    def _read(self, index: int, faults: _Faults) -> tuple[Image.Image, int]:
        for place in (*range(index, len(self.dataset)), *range(index)):
            try:
                return self.dataset.read(place)
            except BadSampleError as error:
                faults.append((place, str(error)))
        raise InputError(f"task {self.name}: no training sample can be used; {faults[0][1]}")

    def _fetch_ahead(self, start: int) -> None:
        if not self.dataset.is_remote or self._ahead == (ahead := self.order.shards_ahead(start)):
            return
        self._ahead = ahead

        def fetch() -> None:
            with suppress(InputError):  # reading a sample will say so
                for shard in ahead:
                    self.dataset.fetch(shard)

        threading.Thread(target=fetch, daemon=True).start()


class _EvaluationBatches(torch.utils.data.Dataset):
    """Batch number -> (batch, faults), or the InputError that prevents it."""

    def __init__(self, dataset: ShardDataset, transform: EvaluationTransform, indices: list[list[int]]) -> None:
        self.dataset, self.transform, self.indices = dataset, transform, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> tuple[Batch, _Faults] | InputError:
        faults: _Faults = []
        images, labels, positions = [], [], []
        try:
            for index in self.indices[number]:
                try:
                    image, label = self.dataset.read(index)
                except BadSampleError as error:
                    faults.append((index, str(error)))
                    continue
                images.append(self.transform(image))
                labels.append(label)
                positions.append(index)
        except InputError as error:
            return error
        if not images:
            images = [self.transform(Image.new("RGB", (1, 1)))]
        return {
            "image": torch.stack(images)[: len(labels)],
            "label": torch.tensor(labels, dtype=torch.int64),
            "position": torch.tensor(positions, dtype=torch.int64),
        }, faults
