"""Batches of a task in an exact order: a function of seed, task and step, whatever the number of ranks and workers.

Sample g of a task is what `order` says; batches straddle epochs, and a run that is resumed goes on at the next g.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch

from r1p_dist.config import RunConfig
from r1p_dist.data.batches import Batch, EvaluationBatches, TrainBatches, iterate
from r1p_dist.data.encoders import Encoder
from r1p_dist.data.order import GroupedOrder, MixtureOrder, SampleOrder
from r1p_dist.data.remote import ShardCache
from r1p_dist.data.shards import JointDataset, ShardDataset
from r1p_dist.data.stream import Task, check_one_kind
from r1p_dist.distributed import rank, sum_over_ranks, world_size
from r1p_dist.errors import InputError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extra:
    """Tasks mixed into a stage's training, for replay or as a reference; share: of the samples, above 0."""

    name: str
    tasks: Sequence[Task]
    share: float


class TrainLoader:
    """The training micro batches of one rank, for one task or for several of its kind at once (joint training, replay).

    Yields what the encoder makes of n samples, with "sample": (n,) int64, their numbers, and for pictures of classes
    "label": (n,) int64, which indexes `prompts`, the training prompt of each class of each task. A sample that cannot
    be used is replaced by the next one of the data set, is logged and counted in `replaced` (message -> times).
    `check_faults` compares those of all ranks with `max_bad_fraction`, so that all ranks end together; `bad_samples` is
    how many there were at the last check.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        iterations: int | None,
        global_batch_size: int,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        encoder: Encoder,
        seed: int,
        shots: int | None,
        include_validation: bool,
        workers: int,
        samples: int | None = None,
        extras: Sequence[Extra] = (),
        shuffle_shards: int | None = None,
        group_by_length: int | None = None,
        max_bad_fraction: float | None = None,
        cache: ShardCache | None = None,
    ) -> None:
        """Index the training shards.

        iterations: None for those of an epoch, the last of which may see some samples twice. shots, samples: of each
        class or instruction task, None: all. shuffle_shards: how many shards' samples are mixed, None: the whole
        epoch's. group_by_length: how many global batches' conversations are sorted by length among themselves.
        InputError: batch sizes that do not divide, unusable shards, sizes other than the stream file says, tasks of
        both kinds.
        """
        share = _micro_batch_size(global_batch_size, gradient_accumulation_steps, world_size)
        splits = ("train", "validation") if include_validation else ("train",)
        groups = [tasks, *(extra.tasks for extra in extras)]
        # A stream checks its own tasks; those of data.reference come from another one.
        check_one_kind([task for group in groups for task in group], "data.reference")

        def load(task: Task) -> ShardDataset:
            return _load_dataset(task, splits, cache, shots=shots, samples=samples, seed=seed)

        joint = [JointDataset([load(task) for task in group]) for group in groups]
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
        if iterations is None:
            iterations = math.ceil(len(self.dataset) / global_batch_size)
        self._micro_batches = range(iterations * gradient_accumulation_steps)
        self._global_batch_size, self._accumulation = global_batch_size, gradient_accumulation_steps
        names = [self.name, *(f"{self.name} {extra.name}" for extra in extras)]
        orders = [
            SampleOrder(part.shard_sizes(), seed, name, shuffle_shards) for part, name in zip(joint, names, strict=True)
        ]
        order: SampleOrder | MixtureOrder | GroupedOrder = orders[0]
        if extras:
            shares = [extra.share for extra in extras]
            order = MixtureOrder(orders, [1 - sum(shares), *shares], seed, self.name)
        if group_by_length is not None:
            if not tasks[0].is_instruction:
                raise InputError(
                    f"task {self.name}: data.group_by_length={group_by_length} sorts conversations, and pictures of "
                    "classes are all of one length; set it to null"
                )
            batch_size = global_batch_size // gradient_accumulation_steps
            window = group_by_length * gradient_accumulation_steps
            order = GroupedOrder(order, self.dataset.lengths, batch_size, window, seed, self.name)
        self._batches = TrainBatches(self.dataset, order, encoder, seed, self.name, share, rank, world_size)

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
        for batch, faults in iterate(self._batches, self._micro_batches, self._workers):
            for index, fault in faults:
                if index not in self._bad:
                    _logger.warning("%s; the next sample takes its place", fault)
                    self._bad.add(index)
                self.replaced[fault] += 1
            yield batch

    def steps(self) -> Iterator[list[Batch]]:
        """Yield the micro batches of one optimizer step after another."""
        batches = iter(self)
        while step := list(islice(batches, self._accumulation)):
            yield step

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

    Yields what the encoder makes of n samples, with "position": (n,) int64, their places in the split, "sample": (n,)
    int64, their numbers, and for pictures of classes "label": (n,) int64, for conversations "references": a list of n
    `Reference`. A sample that cannot be used is left out, logged, and kept by its place in `left_out`. All ranks yield
    equally many batches, because a forward pass under ZeRO-3 is collective: shares are cut as evenly as possible into
    batches of at most `batch_size`, and one without any sample has n = 0. The encoder's part then has 0 rows for
    pictures of classes; for conversations it is the encoder's blank, one row of no sample, with the number -1.
    """

    def __init__(
        self,
        task: Task,
        *,
        split: str,
        batch_size: int,
        rank: int,
        world_size: int,
        encoder: Encoder,
        workers: int,
        cache: ShardCache | None = None,
    ) -> None:
        """Index the shards of `split`. InputError: no such split, unusable shards, sizes other than the stream says."""
        self.dataset = _load_dataset(task, (split,), cache)
        self.left_out: set[int] = set()
        batch_count = math.ceil(math.ceil(len(self.dataset) / world_size) / batch_size)
        share = np.array_split(np.arange(rank, len(self.dataset), world_size), batch_count)
        self._batches = EvaluationBatches(self.dataset, encoder, [indices.tolist() for indices in share])
        self._workers = workers

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch, faults in iterate(self._batches, range(len(self._batches)), self._workers):
            for index, fault in faults:
                if index not in self.left_out:
                    _logger.warning("%s; it is left out of the evaluation", fault)
                    self.left_out.add(index)
            yield batch


def train_loader(
    config: RunConfig,
    tasks: Sequence[Task],
    iterations: int | None,
    encoder: Encoder,
    past: Sequence[Task] = (),
    reference: Sequence[Task] = (),
    kept: int | None = None,
) -> TrainLoader:
    """Return this rank's training loader; a run that is scored on the test split trains on the validation split too.

    iterations: None for those of an epoch. past: the tasks that were trained before, for data.replay_share. reference:
    those of data.reference. kept: samples of each class, or of each task of conversations, in place of data.shots and
    data.samples.
    """
    data = config.data
    shots, samples = data.shots, data.samples
    if kept is not None:
        shots, samples = (None, kept) if tasks[0].is_instruction else (kept, None)
    extras = [Extra("replay", past, data.replay_share), Extra("reference", reference, data.reference_share)]
    return TrainLoader(
        tasks,
        iterations=iterations,
        global_batch_size=config.train.global_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        rank=rank(),
        world_size=world_size(),
        encoder=encoder,
        seed=config.seed,
        shots=shots,
        samples=samples,
        include_validation=data.evaluate_on == "test",
        workers=data.workers,
        extras=[extra for extra in extras if extra.tasks and extra.share],
        shuffle_shards=data.shuffle_shards,
        group_by_length=data.group_by_length,
        max_bad_fraction=data.max_bad_fraction,
        cache=_cache(config),
    )


def evaluation_loaders(config: RunConfig, tasks: Sequence[Task], encoder: Encoder) -> dict[str, EvaluationLoader]:
    """Return task name -> this rank's loader of the split that the run is scored on."""
    return {
        task.name: EvaluationLoader(
            task,
            split=config.data.evaluate_on,
            batch_size=config.evaluation.batch_size,
            rank=rank(),
            world_size=world_size(),
            encoder=encoder,
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
    task: Task,
    splits: Sequence[str],
    cache: ShardCache | None,
    *,
    shots: int | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> ShardDataset:
    shards = [shard for split in splits for shard in getattr(task, split)]
    if not shards:
        raise InputError(f"task {task.name}: no {splits[0]} shards in the stream file; add them or use another split")
    class_names = None if task.is_instruction else task.class_names
    dataset = ShardDataset(shards, class_names, shots=shots, samples=samples, seed=seed, cache=cache)
    used = [split for split in splits if getattr(task, split)]
    # A shard that was forgotten in the list would go unseen otherwise.
    if shots is None and samples is None and all(split in task.sizes for split in used):
        expected = sum(task.sizes[split] for split in used)
        if len(dataset) != expected:
            raise InputError(
                f"task {task.name}: {' + '.join(used)} shards ({shards[0]} ...) have {len(dataset)} samples, "
                f"the stream file's sizes say {expected}; correct its list of shards or its sizes"
            )
    return dataset
