"""Random access to WebDataset shards: uncompressed tar files with the files of each sample, as samples.py has them.

A sample is read with one positioned read of its bytes, wherever it lies. webdataset's own pipelines read a shard from
its beginning: they cannot go on in the middle of an epoch, nor share one order among any number of ranks and workers.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from r1p_dist.data.index import INDEX, IndexedSample, ShardRecord, parse_index, scan_headers
from r1p_dist.data.remote import NotThereError, ShardCache, is_url, read_remote
from r1p_dist.data.samples import (
    LABEL_BYTES,
    BadSampleError,
    Sample,
    decode_picture,
    decode_pictures,
    parse_conversation,
    parse_label,
    picture_suffix,
    picture_suffixes,
    sample_number,
    split_sample,
)
from r1p_dist.errors import InputError

_UNKNOWN = -1  # crc32 of a sample that no index.json has
_OPEN_SHARDS = 256  # well under the usual limit of 1024 open files per process


class ShardDataset(torch.utils.data.Dataset):
    """Map-style dataset over tar shards, local or remote, of pictures with labels or of conversations.

    The constructor learns where the samples lie, and their labels or lengths: from the index.json beside the shards
    where there is one, else from their headers. `read` then gets a sample with one positioned read. labels: all 0 for
    conversations. lengths: the bytes of each conversation's text; empty for pictures with labels.
    """

    def __init__(
        self,
        shards: Sequence[Path | str],
        class_names: Sequence[str] | None,
        *,
        shots: int | None = None,
        samples: int | None = None,
        seed: int = 0,
        cache: ShardCache | None = None,
    ) -> None:
        """Index `shards`; class_names: None for conversations.

        Keeps `shots` samples of each class, or `samples` conversations, the same ones for a seed. cache: for remote
        shards; None: the user's cache folder. InputError: an unusable shard or index, a sample without its files, a
        label outside `class_names`, fewer samples than are to be kept, `shots` or `samples` of the other kind.
        """
        self.shards = [shard if is_url(shard) else Path(shard) for shard in shards]
        self.class_names = class_names
        self.labels: list[int] = []
        self.lengths: list[int] = []
        self._cache = cache or ShardCache()
        self._keys: list[str] = []
        self._files: dict[int, BinaryIO] = {}
        self._indexes: dict[str, dict[str, ShardRecord]] = {}  # by the place of index.json, while indexing
        self._sha256: list[str | None] = []
        spans: list[tuple[int, int, int, int]] = []  # (shard, start, stop, crc32) of each sample
        try:
            for number in range(len(self.shards)):
                spans += self._index(number)
            if not self._keys:
                raise InputError("no shard given: name at least one .tar file")
            self._spans = np.array(spans, dtype=np.int64)
            if shots is not None:
                self._keep_shots(shots, seed)
            if samples is not None:
                self._keep_samples(samples, seed)
        except InputError:
            self._close()  # not when the error goes, in whatever order its objects do
            raise
        self._indexes.clear()

    def _index(self, number: int) -> list[tuple[int, int, int, int]]:
        record = self._record(number)
        self._sha256.append(record.sha256 if record else None)
        if record is None or (record.lengths if self.class_names is None else record.labels) is None:
            return self._scan(number)
        self._keys += record.keys
        if self.class_names is None:
            self.lengths += record.lengths
            self.labels += [0] * record.samples
        else:
            self.labels += record.labels
            if record.labels and max(record.labels) >= len(self.class_names):
                parse_label(str(max(record.labels)).encode(), len(self.class_names), f"{self.shards[number]}: {INDEX}")
        return [(number, *span) for span in zip(record.offsets, record.stops(), record.crc32, strict=True)]

    def _record(self, number: int) -> ShardRecord | None:
        shard = self.shards[number]
        name = str(shard).rpartition("/")[2]
        index = str(shard).removesuffix(name) + INDEX
        if index not in self._indexes:
            self._indexes[index] = _read_index(index)
        record = self._indexes[index].get(name)
        if record and isinstance(shard, Path):
            size = os.fstat(self._file(number).fileno()).st_size
            if size != record.bytes:
                raise InputError(
                    f"{shard}: has {size} bytes, {index} says {record.bytes}; convert again or remove {INDEX}"
                )
        return record

    def _scan(self, number: int) -> list[tuple[int, int, int, int]]:
        shard, spans = self.shards[number], []
        file = self._file(number)
        for sample in scan_headers(file, str(shard)):
            where = f"{shard}: key {sample.key}"
            if self.class_names is None:
                picture_suffixes(sample.files, where)
                self.lengths.append(sample.files["json"][1])
                self.labels.append(0)
            else:
                self.labels.append(self._scan_label(file, sample, where))
            self._keys.append(sample.key)
            spans.append((number, sample.start, sample.stop, _UNKNOWN))
        return spans

    def _scan_label(self, file: BinaryIO, sample: IndexedSample, where: str) -> int:
        picture_suffix(sample.files, where)
        if "cls" not in sample.files:
            raise InputError(f"{where}: has no label; write the class number as text into {sample.key}.cls")
        offset, size = sample.files["cls"]
        label = os.pread(file.fileno(), min(size, LABEL_BYTES + 1), offset)
        return parse_label(label, len(self.class_names), where)

    def _keep_shots(self, shots: int, seed: int) -> None:
        if self.class_names is None:
            raise InputError(
                f"{self.shards[0]}: shots={shots} counts samples of a class, and conversations have no classes; set "
                "data.samples instead"
            )
        by_class: list[list[int]] = [[] for _ in self.class_names]
        for index, label in enumerate(self.labels):
            by_class[label].append(index)
        smallest = min(range(len(by_class)), key=lambda label: len(by_class[label]))
        name, most = self.class_names[smallest], len(by_class[smallest])
        if not 1 <= shots <= most:
            raise InputError(
                f"{self.shards[0]}: shots={shots} does not fit: class '{name}' (label {smallest}) has {most} samples; "
                f"give 1 to {most}, or null for all"
            )
        self._keep(by_class, shots, seed)

    def _keep_samples(self, samples: int, seed: int) -> None:
        if self.class_names is not None:
            raise InputError(
                f"{self.shards[0]}: samples={samples} counts conversations, and these samples have classes; set "
                "data.shots instead"
            )
        if not 1 <= samples <= len(self):
            raise InputError(
                f"{self.shards[0]}: samples={samples} does not fit: there are {len(self)}; give 1 to {len(self)}, or "
                "null for all"
            )
        self._keep([[*range(len(self))]], samples, seed)

    def _keep(self, groups: Sequence[Sequence[int]], count: int, seed: int) -> None:
        """Keep `count` samples of each group."""

        # A sample's rank comes from its key alone: shard boundaries and the order of shards do not matter.
        def rank(index: int) -> bytes:
            return hashlib.sha256(f"shots\0{seed}\0{self._keys[index]}".encode()).digest()

        kept = sorted(index for indices in groups for index in sorted(indices, key=rank)[:count])
        self.labels = [self.labels[index] for index in kept]
        self.lengths = [self.lengths[index] for index in kept] if self.lengths else []
        self._keys = [self._keys[index] for index in kept]
        self._spans = self._spans[kept]

    def __len__(self) -> int:
        return len(self.labels)

    def shard_sizes(self) -> list[int]:
        """Return how many samples of each shard the data set has."""
        return np.bincount(self._spans[:, 0], minlength=len(self.shards)).tolist()

    def fingerprint(self) -> str:
        """Return a digest of keys, with labels or lengths, in their order: other samples give another one."""
        digest = hashlib.sha256()
        for key, value in zip(self._keys, self.lengths or self.labels, strict=True):
            digest.update(f"{key}\0{value}\n".encode())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Sample:
        return self.read(index)

    def read(self, index: int) -> Sample:
        """Return sample `index`. BadSampleError: damaged, no conversation, or a picture cannot be decoded."""
        shard, start, stop, crc32 = (int(value) for value in self._spans[index])
        content = os.pread(self._file(shard).fileno(), stop - start, start)
        key = self._keys[index]
        where = f"{self.shards[shard]}: key {key}"
        if len(content) != stop - start:
            raise InputError(f"{where}: the shard got shorter since it was indexed; do not change shards during a run")
        if crc32 not in (_UNKNOWN, zlib.crc32(content)):
            raise BadSampleError(f"{where}: its bytes are not those that were written (crc32 differs)")
        files = split_sample(content, key, where)
        number = sample_number(key, files)
        if self.class_names is None:
            suffixes = picture_suffixes(files, where)
            conversation = parse_conversation(files["json"], len(suffixes), where)
            images = decode_pictures([files[suffix] for suffix in suffixes], where)
            return Sample(key, images, **conversation, number=number)
        suffix, label = picture_suffix(files, where), self.labels[index]
        if parse_label(files.get("cls", b""), len(self.class_names), where) != label:
            raise BadSampleError(f"{where}: its label is not {label}, as {INDEX} says; convert again")
        return Sample(key, (decode_picture(files[suffix], where),), label, number=number)

    def fetch(self, shard: int) -> None:
        """Bring a remote shard into the cache ahead of time."""
        if is_url(self.shards[shard]):
            self._cache.open(self.shards[shard], self._sha256[shard]).close()

    def _file(self, number: int) -> BinaryIO:
        # Positioned reads share no file offset, so open files stay right in forked workers.
        if number not in self._files:
            if len(self._files) >= _OPEN_SHARDS:
                self._files.pop(next(iter(self._files))).close()
            shard = self.shards[number]
            if is_url(shard):
                self._files[number] = self._cache.open(shard, self._sha256[number])
            else:
                self._files[number] = _open_local(shard)
        return self._files[number]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            file.close()


def _read_index(place: str) -> dict[str, ShardRecord]:
    if not is_url(place):
        return parse_index(Path(place).read_bytes(), place) if Path(place).is_file() else {}
    try:
        return parse_index(read_remote(place), place)
    except NotThereError:
        return {}


def _open_local(shard: Path) -> BinaryIO:
    try:
        return open(shard, "rb")
    except FileNotFoundError as error:
        raise InputError(f"{shard}: shard is missing") from error


class JointDataset(torch.utils.data.Dataset):
    """The samples of several tasks of one kind one after another; labels count through the classes of all tasks."""

    def __init__(self, datasets: Sequence[ShardDataset]) -> None:
        self.datasets = list(datasets)
        self._starts = np.cumsum([0, *(len(dataset) for dataset in datasets)])
        self._label_offsets = np.cumsum([0, *(len(dataset.class_names or ()) for dataset in datasets)]).tolist()
        self._shards = [(dataset, shard) for dataset in datasets for shard in range(len(dataset.shards))]
        self.labels = [
            label + offset
            for dataset, offset in zip(self.datasets, self._label_offsets, strict=False)
            for label in dataset.labels
        ]
        self.lengths = [length for dataset in self.datasets for length in dataset.lengths]

    def __len__(self) -> int:
        return len(self.labels)

    def shard_sizes(self) -> list[int]:
        """Return how many samples of each shard of each task the data set has."""
        return [size for dataset in self.datasets for size in dataset.shard_sizes()]

    def fingerprint(self) -> str:
        """Return a digest of the tasks' own digests."""
        return hashlib.sha256("".join(dataset.fingerprint() for dataset in self.datasets).encode()).hexdigest()

    @property
    def is_remote(self) -> bool:
        """Whether any shard is remote."""
        return any(is_url(shard) for dataset in self.datasets for shard in dataset.shards)

    def fetch(self, shard: int) -> None:
        """Bring a remote shard into the cache ahead of time."""
        dataset, number = self._shards[shard]
        dataset.fetch(number)

    def __getitem__(self, index: int) -> Sample:
        return self.read(index)

    def read(self, index: int) -> Sample:
        """Return sample `index`, its label among all tasks' classes. BadSampleError as ShardDataset."""
        task = int(np.searchsorted(self._starts, index, side="right")) - 1
        sample = self.datasets[task].read(index - int(self._starts[task]))
        return sample if sample.label is None else replace(sample, label=sample.label + self._label_offsets[task])
