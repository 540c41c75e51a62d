"""What a source of samples is made of: its records, and the columns of a table that they come from."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1p_dist.data.samples import IMAGE_SUFFIXES, BadSampleError
from r1p_dist.errors import InputError

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file", "filename", "path", "img")
LABEL_COLUMNS = ("label", "class", "category", "target", "fine_label")
LICENCE_COLUMNS = ("license", "licence")
_CAPTION_COLUMNS = ("caption", "text", "title")
_NO_LICENCE = "unknown"


@dataclass
class Source:
    """A data set before its conversion.

    names: what each record is called in messages, and the order that they come in. labels: class numbers, or None for
    captions and conversations. read: record number -> its files, suffix -> content, without the label. licences: one
    per record, or None where the data set names none.
    """

    kind: str
    names: Sequence[str]
    read: Callable[[int], dict[str, bytes]]
    labels: Sequence[int] | None = None
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    licences: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_conversations(self) -> bool:
        """Whether its records are conversations, which make a task of instructions."""
        return self.kind == "llava"


@dataclass(frozen=True)
class SourceOptions:
    """What a source cannot find out by itself: columns of a table, the pictures' folder, a split of several."""

    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    image_folder: Path | None = None
    split: str = "train"


def is_image(name: str) -> bool:
    """Does the name end like a picture that shards can have."""
    return name.lower().rpartition(".")[2] in IMAGE_SUFFIXES


def shard_suffix(name: str) -> str:
    """Returns the suffix that a picture's file gets in a shard."""
    suffix = name.lower().rpartition(".")[2]
    return "jpg" if suffix == "jpeg" else suffix


@dataclass(frozen=True)
class Files:
    """Reads record i as the picture at paths[i], with its text where there is one."""

    paths: Sequence[Path]
    texts: Sequence[dict[str, bytes]] | None = None

    def __call__(self, index: int) -> dict[str, bytes]:
        return dict([_stored_picture(self.paths[index])]) | (self.texts[index] if self.texts else {})


@dataclass(frozen=True)
class Conversations:
    """Reads record i as its conversation and the pictures at paths[i], which are numbered where there are several."""

    paths: Sequence[tuple[Path, ...]]
    texts: Sequence[bytes]

    def __call__(self, index: int) -> dict[str, bytes]:
        pictures = [_stored_picture(path) for path in self.paths[index]]
        if len(pictures) > 1:
            pictures = [(f"{number}.{suffix}", content) for number, (suffix, content) in enumerate(pictures)]
        return dict(pictures) | {"json": self.texts[index]}


def _stored_picture(path: Path) -> tuple[str, bytes]:
    """Returns a picture's suffix in a shard, and its bytes. BadSampleError: of no format that shards have."""
    if not is_image(path.name):
        raise BadSampleError(f"{path}: no picture that shards can have (.{', .'.join(IMAGE_SUFFIXES)})")
    return shard_suffix(path.name), content_of(path)


def content_of(path: Path) -> bytes:
    """Returns the bytes of a picture's file. InputError: it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def all_texts(values: Iterable[Any], column: str, place: Path) -> list[str]:
    """Returns the values of a column as text. InputError: one is missing."""
    texts = []
    for number, value in enumerate(values):
        if value is None:
            raise InputError(f"{place}: column {column!r} is empty in record {number}; fill it or remove the record")
        texts.append(str(value))
    return texts


def classes_among(values: Iterable[str]) -> tuple[str, ...]:
    """Returns the classes in alphabetical order, numbers in their own and first."""

    def order(value: str) -> tuple:
        return (False, int(value), value) if value.isdecimal() else (True, 0, value)

    return tuple(sorted(set(values), key=order))


def class_numbers(values: Iterable[str], classes: Sequence[str]) -> list[int]:
    """Returns the place of each value among the classes."""
    number = {name: index for index, name in enumerate(classes)}
    return [number[value] for value in values]


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
        raise InputError(f"{place}: no column is named like {', '.join(usual)}; say which with --{needed}-column")
    return found
