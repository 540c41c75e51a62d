"""What a source of samples is made of: its records, how they are read, and the columns of a table they come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from r1p_dist.data.convert.left_out import LeftOut
from r1p_dist.data.convert.pictures import PICTURE
from r1p_dist.errors import InputError

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file", "filename", "path", "img")
LABEL_COLUMNS = ("label", "class", "category", "target", "fine_label")
LICENCE_COLUMNS = ("license", "licence")
_CAPTION_COLUMNS = ("caption", "text", "title")
_NO_LICENCE = "unknown"


class Reader(Protocol):
    """Reads records by their number; pickled into the workers."""

    def __call__(self, index: int) -> dict[str, bytes]:
        """Return a record's files, suffix -> content, without the label; a picture's suffix is PICTURE.

        BadSampleError: the record has none. InputError: a file cannot be read.
        """

    def stamp(self, index: int) -> str:
        """Return what tells cheaply that a record's files are as before, such as their sizes and times; "": nothing."""


@dataclass
class Source:
    """A data set before its conversion.

    names: what each record is called in messages, and the order that they come in. labels: class numbers, or None for
    captions and conversations. licences: one per record, or None where the data set names none. groups: records of one
    group stay in one split; None: each stands alone. left_out: what of the input is no record. notes: lines on what was
    read in a way that may surprise.
    """

    kind: str
    names: Sequence[str]
    read: Reader
    labels: Sequence[int] | None = None
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    licences: Sequence[str] | None = None
    groups: Sequence[str] | None = None
    has_conversations: bool = False  # which make a task of instructions
    notes: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)

    def __len__(self) -> int:
        return len(self.names)

    def part(self, indices: Sequence[int]) -> Source:
        """Returns a source of some of its records, without what was left out."""

        def chosen(values: Sequence | None) -> list | None:
            return None if values is None else [values[index] for index in indices]

        columns = {name: chosen(getattr(self, name)) for name in ("names", "labels", "licences", "groups")}
        return replace(self, **columns, read=_Chosen(self.read, indices), left_out=LeftOut())


@dataclass(frozen=True)
class _Chosen:
    read: Reader
    indices: Sequence[int]

    def __call__(self, index: int) -> dict[str, bytes]:
        return self.read(self.indices[index])

    def stamp(self, index: int) -> str:
        return self.read.stamp(self.indices[index])


@dataclass(frozen=True)
class SourceOptions:
    """What a source cannot find out by itself: columns of a table, the pictures' folder, a split of several."""

    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    image_folder: Path | None = None
    split: str = "train"


@dataclass(frozen=True)
class Files:
    """Reads record i as its pictures, which are numbered where there are several, with its texts where it has some."""

    paths: Sequence[tuple[Path, ...]]
    texts: Sequence[dict[str, bytes]] | None = None

    def __call__(self, index: int) -> dict[str, bytes]:
        paths = self.paths[index]
        suffixes = [PICTURE] if len(paths) == 1 else [f"{number}.{PICTURE}" for number in range(len(paths))]
        pictures = dict(zip(suffixes, map(content_of, paths), strict=True))
        return pictures | (self.texts[index] if self.texts else {})

    def stamp(self, index: int) -> str:
        texts = self.texts[index] if self.texts else {}
        return " ".join([*map(file_stamp, self.paths[index]), *(repr(item) for item in sorted(texts.items()))])


def content_of(path: Path) -> bytes:
    """Returns the bytes of a picture's file. InputError: it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def file_stamp(path: Path) -> str:
    """Returns a file's size in bytes and the time of its last change in nanoseconds."""
    try:
        state = path.stat()
    except OSError:
        return "missing"
    return f"{state.st_size}@{state.st_mtime_ns}"


def all_texts(values: Iterable[Any], column: str, place: Path) -> list[str]:
    """Returns the values of a column as text. InputError: one is missing or blank."""
    texts = []
    for number, value in enumerate(values):
        if value is None or not str(value).strip():
            raise InputError(f"{place}: column {column!r} is empty in record {number}; fill it or remove the record")
        texts.append(str(value))
    return texts


def all_licences(values: Iterable[Any]) -> list[str] | None:
    """Returns one licence per record, or None where no record names one."""
    licences = [" ".join(str(value or "").split()) for value in values]
    return [licence or _NO_LICENCE for licence in licences] if any(licences) else None


def licence_of(record: dict[str, Any]) -> Any:
    """Returns what a sample's metadata say of its licence; None: nothing."""
    return next((value for key, value in record.items() if key.lower() in LICENCE_COLUMNS), None)


def label_or_caption(
    options: SourceOptions, usual_labels: Sequence[str], columns: Sequence[str], place: Path
) -> tuple[str | None, str | None]:
    """Returns the column of labels or that of captions, and None for the other; one that was asked for wins."""
    label = find_column(options.label_column, usual_labels, columns, place)
    caption = find_column(options.caption_column, _CAPTION_COLUMNS, columns, place)
    if (options.label_column is None) != (options.caption_column is None):
        return (label, None) if options.label_column is not None else (None, caption)
    if (label is None) == (caption is None):
        raise InputError(
            f"{place}: columns {', '.join(columns)}: name one of --label-column and --caption-column, not both or none"
        )
    return label, caption


def find_column(
    wanted: str | None, usual: Sequence[str], columns: Sequence[str], place: Path, needed: str | None = None
) -> str | None:
    """Returns the wanted column, or the first that has a usual name; None: there is none, and none is needed."""
    if wanted is not None:
        if wanted not in columns:
            raise InputError(f"{place}: no column {wanted!r}; there are {', '.join(columns)}")
        return wanted
    found = next((column for name in usual for column in columns if column.lower() == name.lower()), None)
    if found is None and needed is not None:
        raise InputError(
            f"{place}: no column is named like {', '.join(usual)}; say which with --{needed}-column, of "
            f"{', '.join(columns)}"
        )
    return found
