"""Writes one shard of a conversion, and the record of what is in it."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from r1p_dist.data.convert.inputs import digest_of, stamp_of
from r1p_dist.data.convert.left_out import FRAMES, UNREADABLE, LeftOut
from r1p_dist.data.convert.pictures import PICTURE, written_picture
from r1p_dist.data.convert.records import Source
from r1p_dist.data.index import IndexedSample, index_shard, sample_stops
from r1p_dist.data.pictures import BACKGROUND
from r1p_dist.errors import BadSampleError
from r1p_dist.files import atomic_file, sha256_of, write_atomically

PARTS = ".parts"  # what a conversion that is not finished knows of its shards


@dataclass(frozen=True)
class ConvertOptions:
    """How a source is written; everything here decides the bytes of the output.

    shard_samples: records per shard. resize: the shorter side in pixels, larger pictures only. background: a colour as
    Pillow names it, behind what is transparent. max_samples, shots: keep so many, or so many per class. seed: which are
    kept, and their order.
    """

    split: str = "train"
    shard_samples: int = 1000
    resize: int | None = None
    background: str = BACKGROUND
    max_samples: int | None = None
    shots: int | None = None
    seed: int = 0


@dataclass
class _Journal:
    """What happened to the records of a shard."""

    written: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    stamps: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)


def part_of(folder: Path, number: int) -> Path:
    """Returns where the record of shard `number` lies until the conversion is finished."""
    return folder / PARTS / f"{number:06d}.json"


def write_shard_of(
    source: Source, folder: Path, options: ConvertOptions, number: int, records: Sequence[int], first: int
) -> LeftOut:
    """Writes shard `number` and its record, and returns what it left out.

    first: the place of its first record, which becomes part of the keys.
    """
    journal = _Journal()
    path = folder / f"{number:06d}.tar"
    with atomic_file(path) as file:
        write_tar(file, _samples(source, options, records, first, journal))
    samples = index_shard(path) if journal.written else []
    starts = [sample.start for sample in samples]
    record = {
        "name": path.name,
        "samples": len(journal.written),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "keys": [sample.key for sample in samples],
        "offsets": starts,
        "crc32": _checksums(path, starts),
        "labels": None if source.labels is None else [source.labels[index] for index in journal.written],
        **({"lengths": [_text_length(sample) for sample in samples]} if source.labels is None else {}),
        "licences": Counter(source.licences[index] for index in journal.written) if source.licences else {},
        "skipped": journal.skipped,
        "left_out": journal.left_out.as_json(),
        "stamps": journal.stamps,
        "digests": journal.digests,
    }
    write_atomically(part_of(folder, number), json.dumps(record))
    return journal.left_out


def _text_length(sample: IndexedSample) -> int:
    return next((sample.files[suffix][1] for suffix in ("json", "txt") if suffix in sample.files), 0)


def _checksums(path: Path, starts: Sequence[int]) -> list[int]:
    with open(path, "rb") as file:
        checksums = []
        for start, stop in zip(starts, sample_stops(starts, path.stat().st_size), strict=True):
            file.seek(start)
            checksums.append(zlib.crc32(file.read(stop - start)))
    return checksums


def _samples(
    source: Source, options: ConvertOptions, records: Sequence[int], first: int, journal: _Journal
) -> Iterator[dict[str, Any]]:
    """Yields the samples to write and fills the journal."""
    for place, index in enumerate(records, first):
        name, digest = source.names[index], ""
        journal.stamps.append(stamp_of(source, index))  # before the files are read: they may change meanwhile
        try:
            read = source.read(index)
            digest = digest_of(source, index, read)
            files = _prepare(read, options, name, journal)
        except BadSampleError as error:
            journal.skipped.append(str(error))
            journal.left_out.add(UNREADABLE, name)
            continue
        finally:
            journal.digests.append(digest)
        if source.labels is not None:
            files["cls"] = str(source.labels[index]).encode()
        journal.written.append(index)
        yield {"__key__": f"s{place:09d}", **files}


def _prepare(read: dict[str, bytes], options: ConvertOptions, name: str, journal: _Journal) -> dict[str, bytes]:
    """Returns a record's files as the shard has them. BadSampleError: a picture cannot be decoded."""
    files, has_more_frames = {}, False
    for suffix, content in read.items():
        if suffix.rpartition(".")[2] == PICTURE:
            picture = written_picture(content, name, options.resize, options.background)
            files[suffix.removesuffix(PICTURE) + picture.suffix] = picture.content
            has_more_frames |= picture.has_more_frames
        else:
            files[suffix] = content
    if has_more_frames:
        journal.left_out.add(FRAMES, name)
    return files


def write_tar(file: BinaryIO, samples: Iterable[dict[str, Any]]) -> None:
    """Writes a tar file whose bytes depend on the samples alone, and are those that webdataset's writer makes.

    By our own means, because webdataset imports torch: a worker would take seconds to start.
    """
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for suffix in sorted(sample.keys() - {"__key__"}):
                member = tarfile.TarInfo(f"{sample['__key__']}.{suffix}")
                member.size, member.mode = len(sample[suffix]), 0o444
                member.uname = member.gname = "root"
                tar.addfile(member, io.BytesIO(sample[suffix]))
