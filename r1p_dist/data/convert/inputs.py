"""What identifies the content that a shard was written from: OUTPUT/SPLIT/inputs.json has it for every record.

A stamp changes with the sizes and times of a record's files, or with its label and texts; it is cheap. Where a stamp is
not as it was, the files are read and their digest decides: a copy of the same data is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from r1p_dist.data.convert.records import Source
from r1p_dist.errors import BadSampleError

INPUTS = "inputs.json"
_UNREADABLE = ""  # the digest of a record without usable files


def stamp_of(source: Source, index: int) -> str:
    """Returns the stamp of a record, 16 hexadecimal digits; "": its source has none."""
    stamp = source.read.stamp(index)
    return _hash(_columns(source, index), stamp.encode("utf-8", "surrogatepass"), size=8) if stamp else ""


def digest_of(source: Source, index: int, files: dict[str, bytes]) -> str:
    """Returns the digest of a record with these files, 32 hexadecimal digits."""
    parts = [part for suffix in sorted(files) for part in (suffix.encode(), files[suffix])]
    return _hash(_columns(source, index), *parts, size=16)


def stamps_if_unchanged(source: Source, records: Sequence[int], written: dict[str, Any]) -> list[str] | None:
    """Returns the stamps that the records of a shard have now; None: the shard was written from other content.

    written: the shard's record, with the stamps and digests of then.
    """
    stamps = []
    for index, stamp, digest in zip(records, written["stamps"], written["digests"], strict=True):
        stamps.append(stamp_of(source, index))
        if stamps[-1] and stamps[-1] == stamp:
            continue
        try:
            now = digest_of(source, index, source.read(index))
        except BadSampleError:
            now = _UNREADABLE
        if now != digest:
            return None
    return stamps


def _columns(source: Source, index: int) -> bytes:
    label = "" if source.labels is None else source.labels[index]
    licence = "" if source.licences is None else source.licences[index]
    return f"{label}\0{licence}".encode("utf-8", "surrogatepass")


def _hash(*parts: bytes, size: int) -> str:
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
