"""The splits of a data set: what others call them, and how they are cut from one set of records."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from r1p_dist.data.convert.records import Source
from r1p_dist.data.stream import SPLITS
from r1p_dist.errors import InputError

SPLIT_NAMES = {
    "train": ("train", "trainval", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}


def split_called(name: str) -> str | None:
    """Returns the split that a folder, a column's value or another library means by a name; None: no split."""
    return next((split for split, names in SPLIT_NAMES.items() if name.strip().casefold() in names), None)


def by_split(names: Iterable[str], place: Path | str) -> dict[str, str]:
    """Returns split -> name of those names that mean one, in the splits' order. InputError: two mean the same."""
    found: dict[str, str] = {}
    for name in names:
        split = split_called(name)
        if split is not None and found.setdefault(split, name) != name:
            raise InputError(
                f"{place}: {found[split]} and {name} both mean the {split} split; merge them or remove one"
            )
    return {split: found[split] for split in SPLITS if split in found}


def cut(source: Source, shares: Mapping[str, float], where: str) -> dict[str, Source]:
    """Returns the split `train` and those of `shares`, whose parts of the source come from the records' names alone.

    Every class gives its share, and one record at least; records of one group stay together. InputError: a class has
    too few.
    """
    classes = source.labels if source.labels is not None else [0] * len(source)
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(classes):
        by_class.setdefault(label, []).append(index)
    chosen: dict[str, list[int]] = {split: [] for split in ("train", *shares)}
    for label, indices in by_class.items():
        rest = _in_drawn_order(source, indices)
        for split, share in shares.items():
            count = max(1, round(share * len(indices)))
            while 0 < count < len(rest) and _group(source, rest[count - 1]) == _group(source, rest[count]):
                count += 1
            chosen[split] += rest[:count]
            rest = rest[count:]
        if not rest:
            name = f"class {source.class_names[label]!r}" if source.class_names else "the data set"
            raise InputError(f"{where}: {name} has {len(indices)} records, too few to cut {', '.join(chosen)} from")
        chosen["train"] += rest
    parts = {split: source.part(sorted(chosen[split])) for split in SPLITS if split in chosen}
    parts["train"].left_out += source.left_out
    return parts


def _in_drawn_order(source: Source, indices: Sequence[int]) -> list[int]:
    def draw(index: int) -> tuple[bytes, int]:
        name = _group(source, index).encode("utf-8", "surrogatepass")
        return hashlib.sha256(name).digest(), index

    return sorted(indices, key=draw)


def _group(source: Source, index: int) -> str:
    return source.names[index] if source.groups is None else source.groups[index]
