"""Where the samples of a shard lie: from the index.json beside it, or from the shard's own headers."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from r1p_dist.data.samples import key_and_suffix
from r1p_dist.errors import InputError

INDEX = "index.json"
SAMPLE_BYTES = 1 << 28  # no picture with its text is larger; a header that says so is damaged or hostile
_BLOCK = tarfile.BLOCKSIZE
_Whole = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class IndexedSample:
    """One sample of a shard: its bytes from `start` to `stop`, headers included, and suffix -> (offset, size)."""

    key: str
    start: int
    stop: int
    files: dict[str, tuple[int, int]]


class ShardRecord(BaseModel):
    """What index.json says about one shard. labels: null without classes; lengths: of samples' texts, in bytes.

    Sample i has the bytes from offsets[i] to the next offset, the last one to the end; crc32 is zlib's of them.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[^/\\]+\.tar$")]
    samples: _Whole
    bytes: _Whole
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    keys: list[str]
    offsets: list[_Whole]
    crc32: list[_Whole]
    labels: list[_Whole] | None
    lengths: list[_Whole] | None = None  # only where there are no labels

    def stops(self) -> list[int]:
        """Return where each sample ends."""
        return sample_stops(self.offsets, self.bytes)


def sample_stops(offsets: Sequence[int], size: int) -> list[int]:
    """Return where each sample of a shard of `size` bytes ends: at the next one's beginning, or the shard's end."""
    return [*offsets[1:], size] if offsets else []


def parse_index(content: bytes, where: str) -> dict[str, ShardRecord]:
    """Return shard name -> record of an index.json. InputError: not of the form that the converter writes."""
    try:
        records = [ShardRecord.model_validate(record) for record in json.loads(content)["shards"]]
    except ValidationError as error:
        fault = error.errors()[0]
        at = ".".join(map(str, fault["loc"]))
        raise InputError(f"{where}: shards: {at}: {fault['msg']}; convert again, or remove the file") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{where}: is no index of shards: {error}; convert again, or remove the file") from error
    for record in records:
        columns = [record.keys, record.offsets, record.crc32]
        columns += [column for column in (record.labels, record.lengths) if column is not None]
        spans = [stop - start for start, stop in zip(record.offsets, record.stops(), strict=True)]
        if any(len(column) != record.samples for column in columns) or any(
            not _BLOCK < span <= SAMPLE_BYTES for span in spans
        ):
            raise InputError(f"{where}: {record.name}: its columns or bytes contradict one another; convert again")
    return {record.name: record for record in records}


def index_shard(shard: Path) -> list[IndexedSample]:
    """Return the samples of a shard in order; reads tar headers alone.

    InputError: not an uncompressed tar, cut off or damaged, a sample's files apart from one another, the same file
    twice, a file that is no sample's by its size, a name that leaves the archive, no sample in it.
    """
    try:
        with open(shard, "rb") as file:
            return scan_headers(file, str(shard))
    except FileNotFoundError as error:
        raise InputError(f"{shard}: shard is missing") from error


def scan_headers(file: BinaryIO, where: str) -> list[IndexedSample]:
    """Return the samples of an open shard as `index_shard` does."""
    samples: list[IndexedSample] = []
    seen: set[str] = set()
    for member in read_headers(file, where):
        parts = key_and_suffix(member.name)
        if is_plain_file(member) and parts:
            _add_file(samples, seen, *parts, member, where)
    if not samples:
        raise InputError(f"{where}: empty shard, no KEY.SUFFIX file in it; remove it from the list or write it again")
    return samples


def is_plain_file(member: tarfile.TarInfo) -> bool:
    """Whether a member has content of its own: it is no folder, link or device."""
    return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)


def read_headers(file: BinaryIO, where: str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an open shard in order; reads tar headers alone.

    InputError: not an uncompressed tar, cut off or damaged, a name that leaves the archive or is no text.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members.clear()  # tarfile keeps every header otherwise
                _check_name(member.name, where)
                yield member
            _check_end(file, tar.offset, where)
    except InputError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"{where}: not a usable uncompressed .tar file: {error}; write it again") from error


def _check_name(name: str, where: str) -> None:
    if name.startswith("/") or ".." in name.split("/"):
        raise InputError(f"{where}: member {name!r} leaves the archive; write it again with relative names")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: member {ascii(name)} has a name that is not UTF-8; write it again") from error


def _add_file(
    samples: list[IndexedSample], seen: set[str], key: str, suffix: str, member: tarfile.TarInfo, where: str
) -> None:
    where = f"{where}: key {key}"
    stop = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
    if not samples or samples[-1].key != key:
        if key in seen:
            raise InputError(
                f"{where}: its files stand apart from one another or the key is used twice; sort the archive by name "
                "(tools/convert_shards.py does)"
            )
        seen.add(key)
        samples.append(IndexedSample(key, member.offset, stop, {}))
    sample = samples[-1]
    if suffix in sample.files:
        raise InputError(f"{where}: file {member.name} stands twice; give each sample a key")
    sample.files[suffix] = (member.offset_data, member.size)
    if stop - sample.start > SAMPLE_BYTES:
        raise InputError(f"{where}: {stop - sample.start} bytes, no sample has over {SAMPLE_BYTES}; write it again")
    samples[-1] = IndexedSample(key, sample.start, stop, sample.files)


def _check_end(file: BinaryIO, offset: int, where: str) -> None:
    # tarfile stops without a word at a damaged header or a cut-off file, and at the seam of two joined archives.
    size = os.fstat(file.fileno()).st_size
    if offset + _BLOCK > size:
        raise InputError(f"{where}: cut off after {size} bytes, the end of the archive is missing; write it again")
    file.seek(offset)
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise InputError(f"{where}: damaged or several archives in one file, near byte {offset}; write it again")
