"""The batches of one rank by their number, made here or in worker processes: samples are read, encoded and collated."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from r1p_dist.data.encoders import Encoder
from r1p_dist.data.order import GroupedOrder, MixtureOrder, SampleOrder, digest_number
from r1p_dist.data.samples import BLANK, BadSampleError, Sample
from r1p_dist.data.shards import JointDataset, ShardDataset
from r1p_dist.errors import InputError

Batch = dict[str, Any]  # tensors, and in an evaluation of conversations a list of references
Faults = list[tuple[int, str]]  # (sample of the data set, reason)


class Reference(NamedTuple):
    """What an answer to a conversation is compared with: the texts that count as right, and the choices, if any."""

    answers: tuple[str, ...]
    choices: tuple[str, ...]


def iterate(batches: torch.utils.data.Dataset, numbers: range, workers: int) -> Iterator[tuple[Batch, Faults]]:
    """Yield batches[number] for each number in order, read ahead by `workers` processes (0: in this one)."""
    if workers == 0:
        results: Iterable = (batches[number] for number in numbers)
    else:
        # Its own generator: the DataLoader would draw from the global one, and dropout would depend on `workers`.
        results = torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
        )
    for result in results:
        # As a value, for a DataLoader would wrap the one-line message into the worker's traceback.
        if isinstance(result, InputError):
            raise result
        yield result


def _columns(samples: Sequence[Sample]) -> Batch:
    """Return what a batch has beside the encoder's part: the samples' numbers and, of pictures of classes, labels."""
    columns = {"sample": torch.tensor([sample.number for sample in samples])}
    if samples[0].label is not None:
        columns["label"] = torch.tensor([sample.label for sample in samples])
    return columns


def _as_it_is(result: Any) -> Any:
    # The DataLoader's own function makes lists of tuples.
    return result


class TrainBatches(torch.utils.data.Dataset):
    """Micro batch number -> (batch of this rank, faults), or the InputError that prevents it."""

    def __init__(
        self,
        dataset: JointDataset,
        order: SampleOrder | MixtureOrder | GroupedOrder,
        encoder: Encoder,
        seed: int,
        name: str,
        share: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.dataset, self.order, self.encoder, self.seed, self.name = dataset, order, encoder, seed, name
        self.share, self.rank, self.world_size = share, rank, world_size
        self._ahead: list[int] = []

    def __getitem__(self, number: int) -> tuple[Batch, Faults] | InputError:
        start = (number * self.world_size + self.rank) * self.share
        faults: Faults = []
        samples, examples = [], []
        try:
            for position, index in enumerate(self.order.take(start, start + self.share), start):
                sample, example = self._encode(index, position, faults)
                samples.append(sample)
                examples.append(example)
            self._fetch_ahead(start)
        except InputError as error:
            return error
        return self.encoder.collate(examples) | _columns(samples), faults

    def _encode(self, index: int, position: int, faults: Faults) -> tuple[Sample, dict[str, Any]]:
        """Return sample `index`, or the next one that can be used, and its example at a position of the order."""
        for place in (*range(index, len(self.dataset)), *range(index)):
            generator = torch.Generator().manual_seed(digest_number("augment", self.seed, self.name, position))
            try:
                sample = self.dataset.read(place)
                return sample, self.encoder.train(sample, generator)
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


class EvaluationBatches(torch.utils.data.Dataset):
    """Batch number -> (batch, faults), or the InputError that prevents it."""

    def __init__(self, dataset: ShardDataset, encoder: Encoder, indices: list[list[int]]) -> None:
        self.dataset, self.encoder, self.indices = dataset, encoder, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> tuple[Batch, Faults] | InputError:
        faults: Faults = []
        samples, examples, positions = [], [], []
        try:
            for index in self.indices[number]:
                try:
                    sample = self.dataset.read(index)
                    example = self.encoder.evaluate(sample)
                except BadSampleError as error:
                    faults.append((index, str(error)))
                    continue
                samples.append(sample)
                examples.append(example)
                positions.append(index)
        except InputError as error:
            return error
        batch = self._collate(samples, examples) if samples else self._blank_batch()
        return batch | {"position": torch.tensor(positions, dtype=torch.int64)}, faults

    def _collate(self, samples: Sequence[Sample], examples: Sequence[dict[str, Any]]) -> Batch:
        batch = self.encoder.collate(examples) | _columns(samples)
        if self.dataset.class_names is None:
            batch["references"] = [Reference(sample.answers, sample.choices) for sample in samples]
        return batch

    def _blank_batch(self) -> Batch:
        example = self.encoder.blank()
        if self.dataset.class_names is None:
            # A model that generates needs a row to do as many forward passes as on the other ranks.
            return self._collate([Sample("blank", (), number=BLANK)], [example]) | {"references": []}
        batch = self._collate([Sample("blank", (), label=0, number=BLANK)], [example])
        return {name: tensor[:0] for name, tensor in batch.items()}
