"""Batches of a task in an exact order: a function of seed, task and step, whatever the number of ranks and workers.

The g-th sample of a task is perm(seed, task, g // n)[g mod n] for n samples, so batches straddle epochs and none is
dropped or padded. A run that is resumed goes on at the next g.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from r1p_dist.config import RunConfig
from r1p_dist.data.shards import BadSampleError, JointDataset, ShardDataset
from r1p_dist.data.stream import Task
from r1p_dist.data.transforms import EvaluationTransform, TrainTransform, evaluation_transform, train_transform
from r1p_dist.distributed import rank, world_size
from r1p_dist.errors import InputError

Batch = dict[str, torch.Tensor]
_logger = logging.getLogger(__name__)


def sample_order(n: int, seed: int, task: str, start: int, stop: int) -> list[int]:
    """Return the dataset indices of a task's samples start, start + 1, ..., stop - 1; n is the task's size."""
    order: list[int] = []
    while start < stop:
        epoch, position = divmod(start, n)
        indices = _permutation(n, seed, task, epoch)[position : position + stop - start].tolist()
        order += indices
        start += len(indices)
    return order


# A batch seldom straddles more than two epochs.
@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, task: str, epoch: int) -> np.ndarray:
    # numpy guarantees the raw stream of a bit generator for ever, but not what Generator.permutation makes of it.
    raw = np.random.PCG64(_digest_number("order", seed, task, epoch)).random_raw(n)
    return np.argsort(raw, kind="stable")


def _sample_generator(seed: int, task: str, sample: int) -> torch.Generator:
    return torch.Generator().manual_seed(_digest_number("augment", seed, task, sample))


def _digest_number(*parts: object) -> int:
    # Python's own hash() differs from process to process.
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little")


class TrainLoader:
    """The training micro batches of one rank, for one task or for several at once (joint training).

    Yields {"image": (n, 3, H, W) float32, "label": (n,) int64}; `label` indexes `prompts`, which has the training
    prompt of each class of each task. A picture that cannot be decoded is replaced by the next one of the dataset, is
    logged and counted in `replaced` (message -> times); more of them than `max_bad_fraction` allows end the run with an
    InputError.
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
        max_bad_fraction: float | None = None,
        start_step: int = 0,
    ) -> None:
        """Index the tasks' training shards; `start_step` counts optimizer steps already done.

        InputError: batch sizes that do not divide, unusable shards, sizes other than the stream file says.
        """
        share = _micro_batch_size(global_batch_size, gradient_accumulation_steps, world_size)
        splits = ("train", "validation") if include_validation else ("train",)
        datasets = [_load_dataset(task, splits, shots, seed) for task in tasks]
        self.dataset = JointDataset(datasets, [len(task.class_names) for task in tasks])
        self.prompts = [task.prompt(label) for task in tasks for label in range(len(task.class_names))]
        self.micro_batch_size = share
        self._most_bad = max(1, len(self.dataset) // 1000)
        if max_bad_fraction is not None:
            self._most_bad = int(max_bad_fraction * len(self.dataset))
        self.replaced: Counter[str] = Counter()
        self._workers = workers
        self._numbers = range(start_step * gradient_accumulation_steps, iterations * gradient_accumulation_steps)
        self.name = "+".join(task.name for task in tasks)
        self._batches = _TrainBatches(self.dataset, transform, seed, self.name, share, rank, world_size)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Batch]:
        for batch, faults in _iterate(self._batches, self._numbers, self._workers):
            for fault in faults:
                if fault not in self.replaced:
                    _logger.warning("%s; the next sample takes its place", fault)
                self.replaced[fault] += 1
            if len(self.replaced) > self._most_bad:
                raise InputError(
                    f"task {self.name}: {len(self.replaced)} of {len(self.dataset)} training pictures cannot be "
                    f"decoded and {self._most_bad} may; mend them or set data.max_bad_fraction; the last: {faults[-1]}"
                )
            yield batch


class EvaluationLoader:
    """One rank's share of a task's split: the samples rank, rank + world_size, ..., each once, none padded.

    Yields {"image": (n, 3, H, W) float32, "label": (n,) int64}. All ranks yield equally many batches, because a
    forward pass under ZeRO-3 is collective: shares are cut as evenly as possible into batches of at most `batch_size`,
    and a rank without any sample yields one batch with n = 0.
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
    ) -> None:
        """Index the shards of `split`. InputError: no such split, unusable shards, sizes other than the stream says."""
        self.dataset = _load_dataset(task, (split,), None, 0)
        batch_count = math.ceil(math.ceil(len(self.dataset) / world_size) / batch_size)
        share = np.array_split(np.arange(rank, len(self.dataset), world_size), batch_count)
        self._batches = _EvaluationBatches(self.dataset, transform, [indices.tolist() for indices in share])
        self._workers = workers

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch, _ in _iterate(self._batches, range(len(self._batches)), self._workers):
            yield batch


def train_loader(config: RunConfig, tasks: Sequence[Task], iterations: int, preprocess: dict[str, Any]) -> TrainLoader:
    """Return this rank's training loader; a run that is scored on the test split trains on the validation split too."""
    return TrainLoader(
        tasks,
        iterations=iterations,
        global_batch_size=config.train.global_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        rank=rank(),
        world_size=world_size(),
        transform=train_transform(preprocess, config.data.augment),
        seed=config.seed,
        shots=config.data.shots,
        include_validation=config.data.evaluate_on == "test",
        workers=config.data.workers,
        max_bad_fraction=config.data.max_bad_fraction,
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
        )
        for task in tasks
    }


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


def _load_dataset(task: Task, splits: Sequence[str], shots: int | None, seed: int) -> ShardDataset:
    shards = [shard for split in splits for shard in getattr(task, split)]
    if not shards:
        raise InputError(f"task {task.name}: no {splits[0]} shards in the stream file; add them or use another split")
    dataset = ShardDataset(shards, task.class_names, shots=shots, seed=seed)
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


def _iterate(batches: torch.utils.data.Dataset, numbers: range, workers: int) -> Iterator[tuple[Batch, list[str]]]:
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
        transform: TrainTransform,
        seed: int,
        name: str,
        share: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.dataset, self.transform, self.seed, self.name = dataset, transform, seed, name
        self.share, self.rank, self.world_size = share, rank, world_size

    def __getitem__(self, number: int) -> tuple[Batch, list[str]] | InputError:
        start = (number * self.world_size + self.rank) * self.share
        order = sample_order(len(self.dataset), self.seed, self.name, start, start + self.share)
        faults: list[str] = []
        images, labels = [], []
        try:
            for sample, index in enumerate(order, start):
                image, label = self._read(index, faults)
                images.append(self.transform(image, _sample_generator(self.seed, self.name, sample)))
                labels.append(label)
        except InputError as error:
            return error
        return {"image": torch.stack(images), "label": torch.tensor(labels)}, faults

    def _read(self, index: int, faults: list[str]) -> tuple[Image.Image, int]:
        for offset in range(len(self.dataset)):
            try:
                return self.dataset.read((index + offset) % len(self.dataset))
            except BadSampleError as error:
                faults.append(str(error))
        raise InputError(f"task {self.name}: no training picture can be decoded; {faults[0]}")


class _EvaluationBatches(torch.utils.data.Dataset):
    """Batch number -> (batch, no faults), or the InputError that prevents it: a score must not skip samples."""

    def __init__(self, dataset: ShardDataset, transform: EvaluationTransform, indices: list[list[int]]) -> None:
        self.dataset, self.transform, self.indices = dataset, transform, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> tuple[Batch, list[str]] | InputError:
        try:
            samples = [self.dataset.read(index) for index in self.indices[number]]
        except InputError as error:
            return error
        if not samples:
            shape = self.transform(Image.new("RGB", (1, 1))).shape
            return {"image": torch.empty(0, *shape), "label": torch.empty(0, dtype=torch.int64)}, []
        images = torch.stack([self.transform(image) for image, _ in samples])
        return {"image": images, "label": torch.tensor([label for _, label in samples])}, []
