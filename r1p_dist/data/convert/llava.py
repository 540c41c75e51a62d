"""LLaVA's conversations: records {"id", "image", "conversations"} in a JSON list or one per line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from r1p_dist.data.convert.records import Files, Source, SourceOptions, all_licences, licence_of
from r1p_dist.data.samples import JSON_BYTES, read_conversation
from r1p_dist.errors import InputError

# Names under which data sets of other trainers keep what is to be seen or heard; `image` alone is read.
_MEDIA = re.compile(
    r"(image|img|picture|pic|photo|video|audio|sound|speech|voice|frame|clip|media|depth|point_?cloud)s?"
    r"(_?(path|file|filename|file_name|name|url|uri|bytes|base64|list|folder|dir)s?)?",
    re.IGNORECASE,
)
_PICTURE_NAME = re.compile(r"(image|img|picture|pic|photo).*", re.IGNORECASE)


def open_llava(path: str, options: SourceOptions) -> Source:
    """LLaVA's conversations; pictures relative to --image-folder.

    image: a path, a list of paths, or nothing. A .json file has a list of records, a .jsonl file one in each line.
    """
    place = Path(path)
    records = _json_lines(place) if place.suffix.lower() == ".jsonl" else _json_list(place)
    folder = options.image_folder or place.parent
    paths, texts, names = [], [], []
    for number, record in enumerate(records):
        where = f"{place}: record {number}"
        pictures = _picture_names(record, where)
        read_conversation(record, len(pictures), where)
        for entry in (record, *record["conversations"]):
            _check_media(entry, where)
        paths.append(tuple(folder / name for name in pictures))
        texts.append({"json": _conversation_text(record, where)})
        names.append(str(record.get("id", number)))
    source = Source("llava", names, Files(paths, texts), has_conversations=True)
    source.groups = [str(place[0]) if place else name for place, name in zip(paths, names, strict=True)]
    source.licences = all_licences(map(licence_of, records))
    return source


def _json_list(place: Path) -> list[Any]:
    try:
        records = json.loads(place.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not a JSON file: {error}") from error
    if not isinstance(records, list):
        raise InputError(f"{place}: must be a list of conversations")
    return records


def _json_lines(place: Path) -> list[Any]:
    records = []
    for number, line in enumerate(place.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: line {number}: not JSON: {error}") from error
    return records


def _picture_names(record: Any, where: str) -> list[str]:
    value = record.get("image") if isinstance(record, dict) else None
    names = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{where}: `image` must be a picture's path or a list of paths, is {repr(value)[:40]}")
    return names


def _check_media(entry: dict[str, Any], where: str) -> None:
    """Raises InputError for a record or turn that names media under a key that nothing reads.

    Where a picture came from may stand beside `image`: "image_url", "image_name".
    """
    is_turn = "conversations" not in entry
    for key, value in entry.items():
        match = _MEDIA.fullmatch(key)
        if match is None or not isinstance(value, str | list | dict) or not value or (key == "image" and not is_turn):
            continue
        if match[2] and _PICTURE_NAME.fullmatch(key) and entry.get("image"):
            continue
        place = " in a turn" if is_turn else ""
        raise InputError(
            f"{where}: key {key!r}{place}: media are read from `image` of the record alone, a picture's path or a list "
            "of them; rename the key or remove the record"
        )


def _conversation_text(record: dict[str, Any], where: str) -> bytes:
    """Returns what the shards have of a record: all but its pictures' paths."""
    rest = {key: value for key, value in record.items() if key != "image"}
    try:
        text = json.dumps(rest, ensure_ascii=False, sort_keys=True).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds what is no Unicode text: {error.reason}") from error
    if len(text) > JSON_BYTES:
        raise InputError(f"{where}: {len(text)} bytes, no conversation has over {JSON_BYTES}; shorten or remove it")
    return text
