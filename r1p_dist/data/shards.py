"""Random access to WebDataset shards: uncompressed tar files with `KEY.jpg|jpeg|png|webp` and `KEY.cls` per sample.

Key and suffix follow webdataset: the base name is cut at its first dot, suffixes are read in lower case. Nothing in a
shard is ever run: only regular files are read, labels as decimal text, pictures by PIL's JPEG, PNG and WebP decoders.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from r1p_dist.errors import InputError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")
LABEL_BYTES = 32  # a longer file is no label: do not read it
_OPEN_SHARDS = 256  # well under the usual limit of 1024 open files per process
_BLOCK = tarfile.BLOCKSIZE


class BadSampleError(InputError):
    """One sample cannot be used, the rest of its shard can; the message names shard, key and reason."""


@dataclass(frozen=True)
class IndexedSample:
    """Where the files of one sample lie in their shard: suffix -> (offset, size), in bytes."""

    key: str
    files: dict[str, tuple[int, int]]


def index_shard(shard: Path) -> list[IndexedSample]:
    """Return the samples of a shard in the order of their first files; reads tar headers alone.

    InputError: not an uncompressed tar, cut off or damaged, the same file twice, no sample in it.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with open(shard, "rb") as file:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members.clear()  # tarfile keeps every header otherwise
                    match = _NAME.fullmatch(member.name)
                    # As webdataset does: names without a suffix and `__meta__` files belong to no sample.
                    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not match:
                        continue
                    if member.name.startswith("__") and member.name.endswith("__"):
                        continue
                    key, suffix = match[1], match[2].lower()
                    if suffix in samples.setdefault(key, {}):
                        raise InputError(f"{shard}: key {key}: file {member.name} stands twice; give each sample a key")
                    samples[key][suffix] = (member.offset_data, member.size)
                _check_end(file, tar.offset, shard)
    except FileNotFoundError as error:
        raise InputError(f"{shard}: shard is missing") from error
    except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{shard}: not a usable uncompressed .tar file: {error}; write it again") from error
    if not samples:
        raise InputError(f"{shard}: empty shard, no KEY.SUFFIX file in it; remove it from the list or write it again")
    return [IndexedSample(key, files) for key, files in samples.items()]


def _check_end(file: BinaryIO, offset: int, shard: Path) -> None:
    # tarfile stops without a word at a damaged header or a cut-off file, and at the seam of two joined archives.
    size = os.fstat(file.fileno()).st_size
    if offset + _BLOCK > size:
        raise InputError(f"{shard}: cut off after {size} bytes, the end of the archive is missing; write it again")
    file.seek(offset)
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise InputError(f"{shard}: damaged or several archives in one file, near byte {offset}; write it again")


class ShardDataset(torch.utils.data.Dataset):
    """Map-style dataset over tar shards; a sample is `(picture, label)`.

    The constructor reads headers and labels once; `read` then gets a picture with one positioned read.
    """

    def __init__(
        self, shards: Sequence[Path], class_names: Sequence[str], *, shots: int | None = None, seed: int = 0
    ) -> None:
        """Index `shards`; with `shots`, keep that many samples of each class, the same for a seed.

        InputError: an unusable shard, a sample without one picture or label, a label outside `class_names`, a class
        with fewer samples than `shots`.
        """
        self.shards = [Path(shard) for shard in shards]
        self.labels: list[int] = []
        self._keys: list[str] = []
        self._places: list[tuple[int, int, int]] | np.ndarray = []  # (shard, offset, size) of each picture
        for number, shard in enumerate(self.shards):
            self._index(number, shard, len(class_names))
        if not self._keys:
            raise InputError("no shard given: name at least one .tar file")
        self._places = np.array(self._places, dtype=np.int64)
        if shots is not None:
            self._keep_shots(class_names, shots, seed)
        self._descriptors: dict[int, int] = {}

    def _index(self, number: int, shard: Path, class_count: int) -> None:
        samples = index_shard(shard)
        with open(shard, "rb") as file:
            for sample in samples:
                where = f"{shard}: key {sample.key}"
                pictures = [suffix for suffix in IMAGE_SUFFIXES if suffix in sample.files]
                if len(pictures) != 1:
                    found = f"files {', '.join(f'.{suffix}' for suffix in sample.files)}"
                    raise InputError(f"{where}: needs one picture (.{', .'.join(IMAGE_SUFFIXES)}), has {found}")
                if "cls" not in sample.files:
                    raise InputError(f"{where}: has no label; write the class number as text into {sample.key}.cls")
                offset, size = sample.files["cls"]
                file.seek(offset)
                self.labels.append(parse_label(file.read(min(size, LABEL_BYTES + 1)), class_count, where))
                self._keys.append(sample.key)
                self._places.append((number, *sample.files[pictures[0]]))

    def _keep_shots(self, class_names: Sequence[str], shots: int, seed: int) -> None:
        by_class: list[list[int]] = [[] for _ in class_names]
        for index, label in enumerate(self.labels):
            by_class[label].append(index)
        smallest = min(range(len(by_class)), key=lambda label: len(by_class[label]))
        if not 1 <= shots <= len(by_class[smallest]):
            raise InputError(
                f"{self.shards[0]}: shots={shots} does not fit: class '{class_names[smallest]}' (label {smallest}) has "
                f"{len(by_class[smallest])} samples; give 1 to {len(by_class[smallest])}, or null for all"
            )

        # A sample's rank comes from its key alone: shard boundaries and the order of shards do not matter.
        def rank(index: int) -> bytes:
            return hashlib.sha256(f"shots\0{seed}\0{self._keys[index]}".encode()).digest()

        kept = sorted(index for indices in by_class for index in sorted(indices, key=rank)[:shots])
        self.labels = [self.labels[index] for index in kept]
        self._keys = [self._keys[index] for index in kept]
        self._places = self._places[kept]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.read(index)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return sample `index` as (RGB picture, label). BadSampleError: the picture cannot be decoded."""
        number, offset, size = (int(value) for value in self._places[index])
        content = os.pread(self._descriptor(number), size, offset)
        where = f"{self.shards[number]}: key {self._keys[index]}"
        if len(content) != size:
            raise InputError(f"{where}: the shard got shorter since it was indexed; do not change shards during a run")
        return decode_picture(content, where), self.labels[index]

    def _descriptor(self, number: int) -> int:
        # Positioned reads share no file offset, so descriptors stay right in forked workers.
        if number not in self._descriptors:
            if len(self._descriptors) >= _OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[number] = os.open(self.shards[number], os.O_RDONLY)
        return self._descriptors[number]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            os.close(descriptor)


class JointDataset(torch.utils.data.Dataset):
    """The samples of several tasks one after another; labels count through the classes of all tasks."""

    def __init__(self, datasets: Sequence[ShardDataset], class_counts: Sequence[int]) -> None:
        self.datasets = list(datasets)
        self._starts = np.cumsum([0, *(len(dataset) for dataset in datasets)])
        self._label_offsets = [sum(class_counts[:task]) for task in range(len(class_counts))]
        self.labels = [
            label + offset
            for dataset, offset in zip(self.datasets, self._label_offsets, strict=True)
            for label in dataset.labels
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.read(index)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return sample `index` as (RGB picture, label among all tasks' classes). BadSampleError as ShardDataset."""
        task = int(np.searchsorted(self._starts, index, side="right")) - 1
        image, label = self.datasets[task].read(index - int(self._starts[task]))
        return image, label + self._label_offsets[task]


def parse_label(content: bytes, class_count: int, where: str) -> int:
    """Return the class number in a .cls file. InputError: no number, or outside the classes."""
    text = content.decode("ascii", errors="replace").strip()
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise InputError(f"{where}: label {text[:LABEL_BYTES]!r} is not a class number")
    if int(text) >= class_count:
        raise InputError(f"{where}: label {int(text)} is outside the class list, {class_count} classes from 0")
    return int(text)


def decode_picture(content: bytes, where: str) -> Image.Image:
    """Return a JPEG, PNG or WebP picture as RGB. BadSampleError: damaged, of another kind, or too large to be safe."""
    try:
        with warnings.catch_warnings():
            # Half-way to its limit PIL only warns; a training picture of that size is a bomb as well.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=_IMAGE_FORMATS) as image:
                return image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSampleError(f"{where}: picture too large to decode safely: {error}") from error
    except UnidentifiedImageError as error:  # its own message names an address in memory
        raise BadSampleError(f"{where}: picture cannot be decoded: no {', '.join(_IMAGE_FORMATS)} file") from error
    # PIL's decoders raise many kinds of errors on damaged bytes.
    except Exception as error:
        raise BadSampleError(f"{where}: picture cannot be decoded: {' '.join(str(error).split())}") from error
