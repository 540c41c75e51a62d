"""WebDataset shards of others as a source: clip_benchmark's layout, img2dataset's output, conversations of our own.

A sample is what webdataset takes for one, files of one base name up to its first dot, wherever in the shard they stand.
Where that leaves no picture that is the sample's own, because names have dots of their own (street.v2.jpg beside
street.v2.cls), the files up to the last dot are a sample.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1p_dist.data.convert.class_names import named_classes
from r1p_dist.data.convert.folders import is_made_by_system
from r1p_dist.data.convert.left_out import SYSTEM, LeftOut
from r1p_dist.data.convert.pictures import PICTURE, is_picture_name, suffix_of
from r1p_dist.data.convert.records import Source, SourceOptions, all_licences, file_stamp, licence_of
from r1p_dist.data.convert.splits import by_split
from r1p_dist.data.index import INDEX, SAMPLE_BYTES, is_plain_file, read_headers
from r1p_dist.data.samples import (
    JSON_BYTES,
    LABEL_BYTES,
    TEXT_SUFFIXES,
    key_and_suffix,
    parse_conversation,
    parse_label,
)
from r1p_dist.data.stream import read_class_names, read_templates
from r1p_dist.errors import InputError

TEMPLATES = "zeroshot_classification_templates.txt"  # clip_benchmark's name
CLASS_NAMES = "classnames.txt"
_BESIDE = {INDEX, "inputs.json", "sizes.json", "nshards.txt", CLASS_NAMES, TEMPLATES, "dataset_type.txt", "stream.yaml"}
_STATISTICS = re.compile(r"[0-9]+(_stats\.json|\.parquet)")  # img2dataset's, beside each shard

_Place = tuple[int, int]  # offset and size in the shard


@dataclass(frozen=True)
class _Member:
    """One sample of a shard: what it is called, and suffix -> place of its files, a picture's suffix being PICTURE."""

    shard: Path
    key: str
    files: dict[str, _Place]

    @property
    def where(self) -> str:
        return f"{self.shard}: key {self.key}"

    def read(self, suffix: str, most: int) -> bytes:
        offset, size = self.files[suffix]
        with open(self.shard, "rb") as file:
            file.seek(offset)
            return file.read(min(size, most + 1))


@dataclass(frozen=True)
class _Members:
    """Reads record i out of its tar shard."""

    members: Sequence[_Member]

    def __call__(self, index: int) -> dict[str, bytes]:
        member = self.members[index]
        return {suffix: member.read(suffix, SAMPLE_BYTES) for suffix in member.files if suffix != "cls"}

    def stamp(self, index: int) -> str:
        member = self.members[index]
        return f"{file_stamp(member.shard)} {sorted(member.files.items())}"


def open_shards(path: str, options: SourceOptions) -> Source:
    """The shards of a split, ROOT/SPLIT/*.tar, or those in ROOT itself; class names in ROOT/classnames.txt."""
    root = Path(path)
    splits = splits_of_shards(root)
    folder = root / splits[options.split] if options.split in splits else root
    left_out = LeftOut()
    shards = _shards_in(folder)
    if options.split == next(iter(splits), options.split):
        for other in {root, folder}:
            _count_beside(other, folder, left_out)
    dotted: list[str] = []
    members = [member for shard in shards for member in _samples_of(shard, left_out, dotted)]
    source = Source("shards", (), _Members(()), left_out=left_out)
    if dotted:
        source.notes.append(
            f"{len(dotted)} samples have dots in their names ({dotted[0]}, ...): written as one each, though "
            "webdataset would cut the names at the first dot"
        )
    source.has_conversations = _has_conversations(members)
    if source.has_conversations:
        members = _conversations(members, left_out)
    else:
        members = _with_one_picture(members, left_out)
    source.names, source.read = [f"{member.shard.name}: {member.key}" for member in members], _Members(members)
    if (root / CLASS_NAMES).is_file() and not source.has_conversations:
        source.class_names = named_classes(read_class_names(root / CLASS_NAMES), str(root / CLASS_NAMES))
        if (root / TEMPLATES).is_file():
            source.templates = read_templates(root / TEMPLATES)
        source.labels = [_label(member, len(source.class_names)) for member in members]
    elif any("cls" in member.files for member in members):
        raise InputError(f"{root}: samples have a .cls, but their class names are missing: write {root / CLASS_NAMES}")
    source.licences = all_licences(map(_licence, members))
    return source


def splits_of_shards(root: Path) -> dict[str, str]:
    """Returns split -> name of the folder with its shards."""
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and any(entry.glob("*.tar")))
    return by_split(folders, root)


def _shards_in(folder: Path) -> list[Path]:
    files = {shard.resolve() for shard in folder.glob("*.tar")}  # one shard can have two names
    return sorted(files, key=lambda shard: (len(shard.name), shard.name))


def _count_beside(folder: Path, chosen: Path, left_out: LeftOut) -> None:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() or entry.name in _BESIDE or _STATISTICS.fullmatch(entry.name):
            continue
        if is_made_by_system(entry.name):
            left_out.add(SYSTEM, entry.name)
        elif entry.suffix != ".tar" or not entry.exists():
            left_out.add("file beside the shards", entry.name)
        elif folder != chosen:
            left_out.add("shard outside the splits' folders", entry.name)


def _samples_of(shard: Path, left_out: LeftOut, dotted: list[str]) -> Iterator[_Member]:
    """Yields the samples of a shard, pictures with suffixes of their own; counts what is of none.

    dotted: gets the names of samples that webdataset would not take for one.
    """
    groups: dict[str, dict[str, _Place]] = {}
    with open(shard, "rb") as file:
        for member in read_headers(file, str(shard)):
            parts = key_and_suffix(member.name)
            if member.isdir():
                continue
            if any(is_made_by_system(part) for part in member.name.removeprefix("./").split("/")):
                left_out.add(SYSTEM, f"{shard.name}: {member.name}")
            elif not is_plain_file(member):
                left_out.add("link or device in a shard", f"{shard.name}: {member.name}")
            elif parts is None:
                left_out.add("member of no sample", f"{shard.name}: {member.name}")
            else:
                files = groups.setdefault(parts[0], {})
                if parts[1] in files:
                    raise InputError(f"{shard}: file {member.name} stands twice; give each sample a key")
                files[parts[1]] = (member.offset_data, member.size)
    for key, files in groups.items():
        for name, own in _split_at_last_dot(key, files).items():
            member = _Member(shard, name, own)
            dotted += [name] if name != key else []
            if sum(size for _, size in own.values()) > SAMPLE_BYTES:
                raise InputError(f"{member.where}: no sample has over {SAMPLE_BYTES} bytes; write it again")
            yield member


def _split_at_last_dot(key: str, files: dict[str, _Place]) -> dict[str, dict[str, _Place]]:
    """Returns the samples that are meant by files of one webdataset key: name -> suffix -> place."""
    if any("." not in suffix and is_picture_name(f"x.{suffix}") for suffix in files) or "json" in files:
        return {key: files}
    parts: dict[str, dict[str, _Place]] = {}
    for suffix, place in files.items():
        before, _, last = suffix.rpartition(".")
        parts.setdefault(before, {})[last] = place
    if "" in parts or not all(_pictures(part) for part in parts.values()):
        return {key: files}
    return {f"{key}.{before}": part for before, part in parts.items()}


def _pictures(files: dict[str, _Place]) -> list[str]:
    return [suffix for suffix in files if is_picture_name(f"x.{suffix}")]


def _with_one_picture(members: Sequence[_Member], left_out: LeftOut) -> list[_Member]:
    """Returns the samples that have one picture, with their texts; counts the others and all other files."""
    kept = []
    for member in members:
        pictures = _pictures(member.files)
        own = [suffix for suffix in pictures if "." not in suffix] or pictures
        if len(own) != 1:
            left_out.add("sample with several pictures" if own else "sample without a picture", member.where)
            continue
        texts = {suffix: place for suffix, place in member.files.items() if suffix in TEXT_SUFFIXES}
        _count_unread(member, {own[0], *texts}, left_out)
        kept.append(_Member(member.shard, member.key, {PICTURE: member.files[own[0]], **texts}))
    return kept


def _conversations(members: Sequence[_Member], left_out: LeftOut) -> list[_Member]:
    """Returns the samples that are conversations, with their pictures; counts the others and all other files."""
    kept = []
    for member in members:
        if "json" not in member.files:
            left_out.add("sample without a conversation", member.where)
            continue
        numbers = {s: int(s.split(".")[0]) for s in _pictures(member.files) if re.fullmatch(r"[0-9]{1,4}\.[^.]+", s)}
        own = [suffix for suffix in _pictures(member.files) if "." not in suffix]
        ordered = sorted(numbers, key=numbers.__getitem__)
        if len(own) > 1 or (own and ordered) or [numbers[suffix] for suffix in ordered] != [*range(len(ordered))]:
            raise InputError(f"{member.where}: needs no picture, one, or .0.jpg, .1.jpg, ... without a gap")
        parse_conversation(member.read("json", JSON_BYTES), len(own) + len(ordered), member.where)
        _count_unread(member, {"json", *own, *ordered}, left_out)
        files = {PICTURE: member.files[own[0]]} if own else {}
        files |= {f"{number}.{PICTURE}": member.files[suffix] for number, suffix in enumerate(ordered)}
        kept.append(_Member(member.shard, member.key, files | {"json": member.files["json"]}))
    return kept


def _has_conversations(members: Sequence[_Member]) -> bool:
    """Whether the first record of a sample is a conversation; img2dataset's .json are metadata."""
    first = next((member for member in members if "json" in member.files and "cls" not in member.files), None)
    record = None if first is None else _record(first)
    return record is not None and "conversations" in record


def _count_unread(member: _Member, read: set[str], left_out: LeftOut) -> None:
    for suffix in sorted(member.files.keys() - read):
        left_out.add(f"file of a sample that is not read (.{suffix_of(f'x.{suffix}')})", f"{member.where}.{suffix}")


def _label(member: _Member, classes: int) -> int:
    if "cls" not in member.files:
        raise InputError(f"{member.where}: has no .cls, but classnames.txt says that these are classes")
    return parse_label(member.read("cls", LABEL_BYTES), classes, member.where)


def _record(member: _Member) -> dict[str, Any] | None:
    """Returns what a sample's .json says; None: it has none, or one of no use."""
    if not 0 < member.files.get("json", (0, 0))[1] <= JSON_BYTES:
        return None
    try:
        record = json.loads(member.read("json", JSON_BYTES))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _licence(member: _Member) -> Any:
    """Returns the licence in a sample's .json, where img2dataset puts the columns that it was asked to keep."""
    record = _record(member)
    return None if record is None else licence_of(record)
