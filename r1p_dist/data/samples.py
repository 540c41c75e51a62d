"""From the bytes of one sample to its files, pictures, label or conversation; nothing in a shard is ever run.

A sample of a class is `KEY.jpg|jpeg|png|webp` and `KEY.cls`. A sample of instructions is `KEY.json`, a conversation as
LLaVA writes it, and no picture, one as above, or several: `KEY.0.jpg`, `KEY.1.jpg`, ...

    {"conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}],
     "answers": ["A cat.", "cat"], "choices": ["cat", "dog"]}       answers (all that count as right), choices: optional

The tar bytes of a sample are read by webdataset's own functions, so key and suffix follow it: the base name is cut at
its first dot, suffixes are read in lower case, links and devices are passed over. Only the suffixes of the table below
are looked at: pictures as pictures.py reads JPEG, PNG and WebP, labels as decimal text, conversations as JSON, anything
else (.pkl, .pth) never.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from r1p_dist.data.pictures import decode_picture
from r1p_dist.errors import BadSampleError, one_line

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT_SUFFIXES = ("cls", "txt", "json")
LABEL_BYTES = 32  # a longer file is no label: do not read it
JSON_BYTES = 1 << 20  # a longer file is no sample's conversation or metadata: do not read it
BLANK = -1  # the number of what stands in for a sample
IMAGE_MARK = "<image>"  # LLaVA's place of a picture in a text
_PIXELS = 1 << 28  # of all pictures of a sample; PIL's own limit is per picture
_WANTED = {*IMAGE_SUFFIXES, *TEXT_SUFFIXES}
_NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)$")
_NUMBERED = re.compile(rf"([0-9]{{1,4}})\.({'|'.join(IMAGE_SUFFIXES)})")
_ROLES: dict[str, Literal["system", "user", "assistant"]] = {"system": "system", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Turn:
    """What one side says in a conversation; `<image>` in the text marks the place of the next picture."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class Sample:
    """One sample: a picture with its label, or a conversation with its pictures.

    images: RGB, in the order of their `<image>` marks. turns: user and assistant in turn, the first one may be the
    system's; `answers` has all texts that count as the right last turn. number: `sample_number`.
    """

    key: str
    images: tuple[Image.Image, ...]
    label: int | None = None
    turns: tuple[Turn, ...] = ()
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    number: int = 0


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """Return webdataset's key and suffix of a member's name; None where it belongs to no sample.

    By our own means, because webdataset imports torch, which conversion does without.
    """
    parts = _NAME.match(name)
    # As webdataset does: `__meta__` files and folders belong to no sample.
    return None if parts is None or re.match(r"__[^/]*__($|/)", name) else (parts[1], parts[2].lower())


def split_sample(content: bytes, key: str, where: str) -> dict[str, bytes]:
    """Return suffix -> bytes of the one sample that `content`, a piece of a tar file, should hold.

    BadSampleError: damaged headers, another key, or files of several samples.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander  # here, for it imports torch

    source = {"url": where, "stream": io.BytesIO(content)}
    try:
        samples = list(group_by_keys(tar_file_expander([source], select_files=_is_wanted)))
    except Exception as error:  # tarfile and webdataset raise many kinds of errors on damaged headers
        raise BadSampleError(f"{where}: damaged header: {one_line(error.args[0] if error.args else error)}") from error
    keys = [sample["__key__"] for sample in samples]
    if keys != [key]:
        found = ", ".join(map(ascii, keys)) or "no file of a sample"
        raise BadSampleError(f"{where}: {found} stands in its place; the shard is damaged or its index.json is old")
    return {suffix: files for suffix, files in samples[0].items() if not suffix.startswith("__")}


def _is_wanted(name: str) -> bool:
    parts = key_and_suffix(name)
    return parts is not None and (parts[1] in _WANTED or is_picture(parts[1]))


def sample_number(key: str, files: dict[str, bytes]) -> int:
    """Return 63 bits that identify a sample in every process and run by its key and content, wherever it lies.

    Key and shard alone would not do: shards of different tasks and splits often have the same names.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8)
    for suffix in sorted(files):
        digest.update(f"\0{suffix}\0{len(files[suffix])}\0".encode())
        digest.update(files[suffix])
    return int.from_bytes(digest.digest(), "little") >> 1


def is_picture(suffix: str) -> bool:
    """Whether a suffix is that of a picture, the only one (`jpg`) or one of several (`0.jpg`)."""
    return suffix in IMAGE_SUFFIXES or _NUMBERED.fullmatch(suffix) is not None


def picture_suffix(suffixes: Collection[str], where: str) -> str:
    """Return the suffix of a sample's one picture. BadSampleError: none or several."""
    pictures = [suffix for suffix in IMAGE_SUFFIXES if suffix in suffixes]
    if len(pictures) != 1:
        found = f"files {', '.join(f'.{suffix}' for suffix in suffixes)}"
        raise BadSampleError(f"{where}: needs one picture (.{', .'.join(IMAGE_SUFFIXES)}), has {found}")
    return pictures[0]


def picture_suffixes(suffixes: Collection[str], where: str) -> list[str]:
    """Return the suffixes of a conversation's pictures in their order.

    BadSampleError: no conversation, or pictures that are neither one without a number nor numbered 0, 1, 2, ...
    """
    if "json" not in suffixes:
        found = ", ".join(f".{suffix}" for suffix in suffixes)
        raise BadSampleError(f"{where}: needs a conversation (.json), has files {found}")
    single = [suffix for suffix in suffixes if suffix in IMAGE_SUFFIXES]
    numbered = {suffix: int(match[1]) for suffix in suffixes if (match := _NUMBERED.fullmatch(suffix))}
    ordered = sorted(numbered, key=numbered.__getitem__)
    if len(single) > 1 or (single and numbered) or [numbered[suffix] for suffix in ordered] != [*range(len(ordered))]:
        found = ", ".join(f".{suffix}" for suffix in (*single, *ordered))
        raise BadSampleError(f"{where}: has pictures {found}; needs none, one, or .0.jpg, .1.jpg, ... without a gap")
    return single or ordered


def parse_label(content: bytes, class_count: int, where: str) -> int:
    """Return the class number in a .cls file. BadSampleError: no number, or outside the classes."""
    text = content.decode("ascii", errors="replace").strip()
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise BadSampleError(f"{where}: label {text[:LABEL_BYTES]!r} is not a class number")
    if int(text) >= class_count:
        raise BadSampleError(f"{where}: label {int(text)} is outside the class list, {class_count} classes from 0")
    return int(text)


def parse_conversation(content: bytes, pictures: int, where: str) -> dict[str, tuple]:
    """Return turns, answers and choices, as `Sample` has them, of a .json file. BadSampleError: it is none."""
    if len(content) > JSON_BYTES:
        raise BadSampleError(f"{where}: conversation of {len(content)} bytes, more than {JSON_BYTES}")
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"{where}: conversation is not JSON: {one_line(error)}") from error
    return read_conversation(record, pictures, where)


def read_conversation(record: Any, pictures: int, where: str) -> dict[str, tuple]:
    """Return turns, answers and choices, as `Sample` has them, of LLaVA's record with so many pictures.

    Pictures without any `<image>` go in front of the first human turn, as LLaVA puts them. BadSampleError: turns that
    do not alternate from human to gpt, a text that is empty, another number of `<image>` than of pictures.
    """
    entries = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(entries, list) or not entries:
        raise BadSampleError(f"{where}: needs a list `conversations` with turns")
    turns = [_read_turn(entry, f"{where}: turn {number}") for number, entry in enumerate(entries)]
    spoken = turns[1:] if turns[0].role == "system" else turns
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or [turn.role for turn in spoken] != expected:
        raise BadSampleError(
            f"{where}: turns must alternate from human to gpt and end with gpt, behind at most one of system; they are "
            f"from {', '.join(entry['from'] for entry in entries[:8])}{' ...' if len(entries) > 8 else ''}"
        )
    answers = _read_texts(record, "answers", where) or (turns[-1].text,)
    return {
        "turns": _place_pictures(turns, pictures, where),
        "answers": answers,
        "choices": _read_texts(record, "choices", where),
    }


def _read_turn(entry: Any, where: str) -> Turn:
    speaker = entry.get("from") if isinstance(entry, dict) else None
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise BadSampleError(f"{where}: must be {{from, value}} with from one of {', '.join(_ROLES)}")
    turn = Turn(_ROLES[speaker], _read_text(entry.get("value"), f"{where}: value"))
    if turn.role != "user" and IMAGE_MARK in turn.text:
        raise BadSampleError(f"{where}: {IMAGE_MARK} in a turn of {speaker}; pictures stand in human turns alone")
    return turn


def _read_text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadSampleError(f"{where}: must be text that is not empty, is {repr(value)[:40]}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair; no tokenizer takes it
        raise BadSampleError(f"{where}: is no Unicode text: {error.reason}") from error
    return value


def _read_texts(record: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    values = record.get(name)
    if values is None:
        return ()
    if not isinstance(values, list):
        raise BadSampleError(f"{where}: {name}: must be a list of texts, is {repr(values)[:40]}")
    return tuple(_read_text(value, f"{where}: {name}[{number}]") for number, value in enumerate(values))


def _place_pictures(turns: list[Turn], pictures: int, where: str) -> tuple[Turn, ...]:
    """Return the turns with an `<image>` for each picture; marks and pictures must agree where there are marks."""
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks == 0 and pictures:
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", f"{IMAGE_MARK}\n" * pictures + turns[first].text)
    elif marks != pictures:
        raise BadSampleError(f"{where}: {marks} {IMAGE_MARK} in its human turns and {pictures} pictures")
    return tuple(turns)


def decode_pictures(contents: list[bytes], where: str) -> tuple[Image.Image, ...]:
    """Return pictures as `decode_picture` does. BadSampleError: as there, or too large to be safe taken together."""
    images, size = [], 0
    for content in contents:
        images.append(decode_picture(content, where))
        size += images[-1].width * images[-1].height
        if size > _PIXELS:
            raise BadSampleError(f"{where}: pictures too large to decode safely: over {_PIXELS} pixels in one sample")
    return tuple(images)
