"""Reads converted shards again and compares them with their index."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1p_dist.data.index import INDEX, index_shard
from r1p_dist.data.samples import BadSampleError, decode_picture, is_picture
from r1p_dist.errors import InputError


def read_indexes(output: Path) -> dict[str, dict[str, Any]]:
    """Returns split -> index of a converted data set. InputError: there is none."""
    found = {}
    for path in sorted(output.glob(f"*/{INDEX}")):
        try:
            found[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not a JSON file: {error}") from error
    if not found:
        raise InputError(f"{output}: no SPLIT/{INDEX} in it; an unfinished conversion has none, run it again")
    return found


def verify_shards(output: Path) -> Iterator[str]:
    """Yields one line per fault: a missing or changed shard, samples that moved, pictures that cannot be decoded."""
    for split, index in read_indexes(output).items():
        for shard in index["shards"]:
            path = output / split / shard["name"]
            if not path.is_file():
                yield f"{path}: missing"
                continue
            content = path.read_bytes()
            if len(content) != shard["bytes"]:
                yield f"{path}: {len(content)} bytes, the index says {shard['bytes']}"
                continue
            if hashlib.sha256(content).hexdigest() != shard["sha256"]:
                yield f"{path}: its bytes are not those that were written (sha256 differs)"
            if shard["samples"]:
                yield from _verify_samples(path, content, shard)


def _verify_samples(path: Path, content: bytes, shard: dict[str, Any]) -> Iterator[str]:
    try:
        samples = index_shard(path)
    except InputError as error:
        yield str(error)
        return
    if [(sample.key, sample.start) for sample in samples] != list(zip(shard["keys"], shard["offsets"], strict=False)):
        yield f"{path}: holds other samples than the index says, or at other places"
    for sample in samples:
        for suffix, (offset, size) in sample.files.items():
            if is_picture(suffix):
                try:
                    decode_picture(content[offset : offset + size], f"{path}: key {sample.key}")
                except BadSampleError as error:
                    yield str(error)
