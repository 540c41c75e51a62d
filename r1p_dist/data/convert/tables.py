"""CSV, TSV and parquet files with one picture's path per row and a class name, a class number or a caption."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from r1p_dist.data.convert.class_names import class_name, class_numbers, classes_among
from r1p_dist.data.convert.folders import files_below
from r1p_dist.data.convert.left_out import LeftOut
from r1p_dist.data.convert.pictures import is_picture_name
from r1p_dist.data.convert.records import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    LICENCE_COLUMNS,
    Files,
    Source,
    SourceOptions,
    all_licences,
    all_texts,
    find_column,
    label_or_caption,
)
from r1p_dist.data.convert.splits import by_split, split_called
from r1p_dist.errors import InputError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SPLIT_COLUMNS = ("split", "subset", "partition")
_MOST_SEARCHED = 100_000  # files, for a hint where pictures are


def open_table(path: str, options: SourceOptions) -> Source:
    """A CSV, TSV or parquet file; of a column that says each row's split, the rows of the one that is asked for."""
    place = Path(path)
    columns, read = _open(place)
    image = find_column(options.image_column, IMAGE_COLUMNS, columns, place, "image")
    label, caption = label_or_caption(options, LABEL_COLUMNS, columns, place)
    licence = find_column(None, LICENCE_COLUMNS, columns, place)
    names = all_texts(read(image), image, place)
    source = Source("table", names, Files(_picture_paths(names, options.image_folder or place.parent, place)))
    source.groups = names  # rows of one picture
    source.licences = None if licence is None else all_licences(read(licence))
    if caption is not None:
        texts = [{"txt": text.encode()} for text in all_texts(read(caption), caption, place)]
        source.read = Files(source.read.paths, texts)
    else:
        values = [
            class_name(value, f"{place}: column {label!r}: record {number}") for number, value in enumerate(read(label))
        ]
        source.class_names = classes_among(values, f"{place}: column {label!r}")
        source.labels = class_numbers(values, source.class_names)
    return _rows_of_split(source, columns, read, options.split, place)


def splits_of_table(path: str) -> tuple[str, ...]:
    """Returns the splits that a table's rows say they belong to; (): no column does."""
    columns, read = _open(Path(path))
    return tuple(_splits(columns, read, Path(path))[1])


def _rows_of_split(
    source: Source, columns: Sequence[str], read: Callable[[str], list], split: str, place: Path
) -> Source:
    column, splits = _splits(columns, read, place)
    if not splits:
        return source
    if split not in splits:
        raise InputError(f"{place}: column {column!r}: no split {split!r}; there are {', '.join(splits)}")
    return source.part([row for row, value in enumerate(read(column)) if split_called(str(value)) == split])


def _splits(columns: Sequence[str], read: Callable[[str], list], place: Path) -> tuple[str | None, dict[str, str]]:
    """Returns the column of splits and what it calls each; InputError: some rows are of no split."""
    column = find_column(None, _SPLIT_COLUMNS, columns, place)
    if column is None:
        return None, {}
    values = [str(value) for value in read(column)]
    splits = by_split(dict.fromkeys(values), f"{place}: column {column!r}")
    other = next((row for row, value in enumerate(values) if split_called(value) is None), None)
    if splits and other is not None:
        raise InputError(
            f"{place}: column {column!r}: {values[other]!r} of record {other} is no split; write train, ..."
        )
    return column, splits


def _open(place: Path) -> tuple[list[str], Callable[[str], list[Any]]]:
    """Returns a table's columns, and a function: column -> its values."""
    kind = place.suffix.lower()
    if kind not in (*_DELIMITERS, ".parquet"):
        raise InputError(f"{place}: a table is a .csv, .tsv or .parquet file")
    return _parquet(place) if kind == ".parquet" else _delimited(place, _DELIMITERS[kind])


def _delimited(place: Path, delimiter: str) -> tuple[list[str], Callable[[str], list[Any]]]:
    rows = []
    try:
        with open(place, newline="", encoding="utf-8-sig") as file:
            head = file.readline()
            # A spreadsheet writes semicolons where the comma is the decimal point.
            delimiter = ";" if delimiter not in head and ";" in head else delimiter
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            columns = list(reader.fieldnames or ())
            for number, row in enumerate(reader, 2):
                if None in row or None in row.values():
                    raise InputError(f"{place}: row {number} has not as many fields as the head; correct it")
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{place}: cannot be read as UTF-8 text with '{delimiter}': {error}") from error
    if len(set(columns)) != len(columns):
        raise InputError(f"{place}: a column's name stands twice in the head: {', '.join(columns)}; rename one")
    return columns, lambda name: [row[name] for row in rows]


def _parquet(place: Path) -> tuple[list[str], Callable[[str], list[Any]]]:
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


def _picture_paths(names: Sequence[str], folder: Path, place: Path) -> list[tuple[Path, ...]]:
    """Returns each row's picture. InputError: the first one is not there.

    A name without a suffix, as competitions write it, is that of the one picture so called; backslashes are Windows'.
    """
    bare = _pictures_by_stem(folder) if any(not is_picture_name(name) for name in names) else {}
    paths = []
    for name in names:
        path = folder / name
        if not is_picture_name(name) and len(bare.get(name, ())) == 1 and not path.exists():
            path = bare[name][0]
        elif "\\" in name and not path.exists():
            path = folder / name.replace("\\", "/")
        paths.append((path,))
    if paths and not paths[0][0].exists():
        raise InputError(f"{place}: {paths[0][0]}: cannot be read: No such file; {_where_it_is(names[0], folder)}")
    return paths


def _pictures_by_stem(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    if folder.is_dir():
        for file in folder.iterdir():
            if is_picture_name(file.name):
                found.setdefault(file.stem, []).append(file)
    return found


def _where_it_is(name: str, folder: Path) -> str:
    """Returns what to do about a picture that is not in the folder."""
    wanted = name.replace("\\", "/").rpartition("/")[2]
    if folder.is_dir():
        for count, file in enumerate(files_below(folder, LeftOut())):
            if wanted in (file.name, file.stem):
                return f"it is in {file.parent}: --image-folder {file.parent}"
            if count > _MOST_SEARCHED:
                break
    return "say with --image-folder what the paths are relative to"
