"""Where samples come from: image folders, tables, tar shards, torchvision, Hugging Face datasets, LLaVA conversations.

A source knows its records without reading pictures, so that they can be chosen, put in order and shared out among
workers first; `read` then gets one record's files. Sources are pickled into the workers.
"""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1p_dist.data.convert.libraries import open_datasets, open_torchvision
from r1p_dist.data.convert.records import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    LICENCE_COLUMNS,
    Conversations,
    Files,
    Source,
    SourceOptions,
    all_licences,
    all_texts,
    class_numbers,
    classes_among,
    find_column,
    is_image,
    label_or_caption,
    licence_of,
    shard_suffix,
)
from r1p_dist.data.index import IndexedSample, index_shard
from r1p_dist.data.samples import IMAGE_SUFFIXES, JSON_BYTES, LABEL_BYTES, parse_label, read_conversation
from r1p_dist.data.stream import read_class_names, read_templates
from r1p_dist.errors import InputError

TEMPLATES = "zeroshot_classification_templates.txt"  # clip_benchmark's name
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def open_source(path: str, kind: str | None, options: SourceOptions) -> Source:
    """Opens a data set; kind None: recognised from what is there.

    InputError: nothing there, a kind that does not exist or cannot be recognised, whatever is wrong in the data set.
    """
    kind = kind or _recognise(path)
    if kind not in SOURCES:
        raise InputError(f"--from {kind}: no such kind; there are {', '.join(SOURCES)}")
    try:
        source = SOURCES[kind](path, options)
    except OSError as error:
        raise InputError(f"{path}: cannot be read as {kind}: {error.strerror or error}") from error
    if not len(source):
        raise InputError(f"{path}: no samples in it (read as {kind})")
    return source


def _recognise(path: str) -> str:
    if path.startswith("torchvision:"):
        return "torchvision"
    place = Path(path)
    if not place.exists():
        raise InputError(f"{path}: no such file or folder")
    if place.is_file():
        kinds = {".csv": "table", ".tsv": "table", ".parquet": "table", ".json": "llava", ".jsonl": "llava"}
        if place.suffix in kinds:
            return kinds[place.suffix]
    elif (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        return "datasets"
    elif any(place.glob("*.tar")) or any(place.glob("*/*.tar")):
        return "shards"
    elif any(is_image(file.name) for file in place.glob("*/**/*")):
        return "folder"
    raise InputError(f"{path}: cannot tell what this is; say --from {'|'.join(SOURCES)}")


def _folder(path: str, options: SourceOptions) -> Source:
    """Pictures in one directory per class; the classes are the directories in alphabetical order."""
    root = Path(path)
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(file for file in (root / name).rglob("*") if file.is_file() and is_image(file.name))
        if not found:
            raise InputError(
                f"{root / name}: no picture (.{', .'.join(IMAGE_SUFFIXES)}) in it; remove or fill the class"
            )
        paths += found
        labels += [label] * len(found)
    names = [file.relative_to(root).as_posix() for file in paths]
    return Source("folder", names, Files(paths), labels, tuple(classes))


def _table(path: str, options: SourceOptions) -> Source:
    """A CSV, TSV or parquet file with one picture path per row and a class name, a class number or a caption."""
    place = Path(path)
    if place.suffix not in (*_DELIMITERS, ".parquet"):
        raise InputError(f"{place}: a table is a .csv, .tsv or .parquet file")
    columns, read = (_parquet if place.suffix == ".parquet" else _delimited)(place)
    image = find_column(options.image_column, IMAGE_COLUMNS, columns, place, "image")
    label, caption = label_or_caption(options, LABEL_COLUMNS, columns, place)
    licence = find_column(None, LICENCE_COLUMNS, columns, place)
    names = all_texts(read(image), image, place)
    folder = options.image_folder or place.parent
    paths = [folder / name for name in names]
    licences = None if licence is None else all_licences(read(licence))
    if caption is not None:
        texts = [{"txt": text.encode()} for text in all_texts(read(caption), caption, place)]
        return Source("table", names, Files(paths, texts), licences=licences)
    values = all_texts(read(label), label, place)
    classes = classes_among(values)
    return Source("table", names, Files(paths), class_numbers(values, classes), classes, licences=licences)


def _delimited(place: Path) -> tuple[list[str], Callable[[str], list[Any]]]:
    """Returns a CSV or TSV file's columns, and a function: column -> its values."""
    rows = []
    try:
        with open(place, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=_DELIMITERS[place.suffix], strict=True)
            columns = list(reader.fieldnames or ())
            for number, row in enumerate(reader, 2):
                if None in row or None in row.values():
                    raise InputError(f"{place}: row {number} has not as many fields as the head; correct it")
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{place}: cannot be read as UTF-8 text with '{_DELIMITERS[place.suffix]}': {error}"
        ) from error
    return columns, lambda name: [row[name] for row in rows]


def _parquet(place: Path) -> tuple[list[str], Callable[[str], list[Any]]]:
    """Returns a parquet file's columns, and a function: column -> its values."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{place}: parquet files need pyarrow: pip install pyarrow") from error
    try:
        schema = pyarrow.parquet.read_schema(place)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{place}: not a parquet file: {error}") from error

    def read(name: str) -> list[Any]:
        kind = schema.field(name).type
        if pyarrow.types.is_nested(kind) or pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
            raise InputError(
                f"{place}: column {name!r} holds {kind}, not text; a table of pictures must be a saved data set first: "
                f"datasets.Dataset.from_parquet({str(place)!r}).save_to_disk(FOLDER)"
            )
        return pyarrow.parquet.read_table(place, columns=[name]).column(0).to_pylist()

    return schema.names, read


@dataclass(frozen=True)
class _Members:
    """Reads record i out of its tar shard."""

    places: Sequence[tuple[Path, IndexedSample]]

    def __call__(self, index: int) -> dict[str, bytes]:
        shard, sample = self.places[index]
        files = {}
        with open(shard, "rb") as file:
            for suffix, (offset, size) in sample.files.items():
                if suffix in IMAGE_SUFFIXES or suffix in ("txt", "json"):
                    file.seek(offset)
                    files[shard_suffix(suffix)] = file.read(size)
        return files


def _shards(path: str, options: SourceOptions) -> Source:
    """WebDataset shards: clip_benchmark's layout (ROOT/SPLIT/0.tar, ROOT/classnames.txt) or img2dataset's output."""
    root = Path(path)
    folder = root / options.split if (root / options.split).is_dir() else root
    files = {shard.resolve() for shard in folder.glob("*.tar")}  # one shard can have two names
    shards = sorted(files, key=lambda shard: (len(shard.name), shard.name))
    places = [(shard, sample) for shard in shards for sample in index_shard(shard)]
    places = [(shard, s) for shard, s in places if any(suffix in s.files for suffix in IMAGE_SUFFIXES)]
    names = [f"{shard.name}: {sample.key}" for shard, sample in places]
    source = Source("shards", names, _Members(places))
    if (root / "classnames.txt").is_file():
        source.class_names = read_class_names(root / "classnames.txt")
        if (root / TEMPLATES).is_file():
            source.templates = read_templates(root / TEMPLATES)
        source.labels = [_label(shard, sample, len(source.class_names)) for shard, sample in places]
    elif any("cls" in sample.files for _, sample in places):
        raise InputError(f"{root}: samples have a .cls, but their class names are missing: write {root}/classnames.txt")
    source.licences = all_licences(_member_licence(shard, sample) for shard, sample in places)
    return source


def _member_licence(shard: Path, sample: IndexedSample) -> Any:
    """Returns the licence in a sample's .json, where img2dataset puts the columns that it was asked to keep."""
    offset, size = sample.files.get("json", (0, 0))
    if not 0 < size <= JSON_BYTES:
        return None
    with open(shard, "rb") as file:
        file.seek(offset)
        try:
            record = json.loads(file.read(size))
        except (ValueError, RecursionError):
            return None
    return licence_of(record) if isinstance(record, dict) else None


def _label(shard: Path, sample: IndexedSample, classes: int) -> int:
    if "cls" not in sample.files:
        raise InputError(f"{shard}: key {sample.key}: has no .cls, but classnames.txt says that these are classes")
    offset, size = sample.files["cls"]
    with open(shard, "rb") as file:
        file.seek(offset)
        return parse_label(file.read(min(size, LABEL_BYTES + 1)), classes, f"{shard}: key {sample.key}")


def _llava(path: str, options: SourceOptions) -> Source:
    """LLaVA's conversations: records {"id", "image", "conversations"}; pictures relative to --image-folder.

    image: a path, a list of paths, or nothing. A .json file has a list of records, a .jsonl file one in each line.
    """
    place = Path(path)
    records = _json_lines(place) if place.suffix == ".jsonl" else _json_list(place)
    folder = options.image_folder or place.parent
    paths, texts, names = [], [], []
    for number, record in enumerate(records):
        where = f"{place}: record {number}"
        pictures = _picture_names(record, where)
        read_conversation(record, len(pictures), where)
        paths.append(tuple(folder / name for name in pictures))
        texts.append(_conversation_text(record, where))
        names.append(str(record.get("id", number)))
    return Source("llava", names, Conversations(paths, texts), licences=all_licences(map(licence_of, records)))


def _json_list(place: Path) -> list[Any]:
    try:
        records = json.loads(place.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not a JSON file: {error}") from error
    if not isinstance(records, list):
        raise InputError(f"{place}: must be a list of conversations")
    return records


def _json_lines(place: Path) -> list[Any]:
    records = []
    for number, line in enumerate(place.read_bytes().split(b"\n"), 1):
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


SOURCES: dict[str, Callable[[str, SourceOptions], Source]] = {
    "folder": _folder,
    "table": _table,
    "shards": _shards,
    "torchvision": open_torchvision,
    "datasets": open_datasets,
    "llava": _llava,
}
