"""Where samples come from: image folders, tables, tar shards, torchvision, Hugging Face datasets, LLaVA conversations.

A source knows its records without reading pictures, so that they can be chosen, put in order and shared out among
workers first; `read` then gets one record's files. Sources are pickled into the workers.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from r1p_dist.data.shards import IMAGE_SUFFIXES, LABEL_BYTES, IndexedSample, index_shard, parse_label
from r1p_dist.data.stream import read_class_names, read_templates
from r1p_dist.errors import InputError

TEMPLATES = "zeroshot_classification_templates.txt"  # clip_benchmark's name
_IMAGE_COLUMNS = ("image", "image_path", "filepath", "file", "filename", "path", "img")
_LABEL_COLUMNS = ("label", "class", "category", "target", "fine_label")
_CAPTION_COLUMNS = ("caption", "text", "title")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass
class Source:
    """A data set before its conversion.

    names: what each record is called in messages, and the order that they come in. labels: class numbers, or None for
    captions and conversations. read: record number -> its files, suffix -> content, without the label.
    """

    kind: str
    names: Sequence[str]
    read: Callable[[int], dict[str, bytes]]
    labels: Sequence[int] | None = None
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    licences: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class SourceOptions:
    """What a source cannot find out by itself: columns of a table, the pictures' folder, a split of several."""

    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    image_folder: Path | None = None
    split: str = "train"


def open_source(path: str, kind: str | None, options: SourceOptions) -> Source:
    """Opens a data set; kind None: recognised from what is there.

    InputError: nothing there, a kind that does not exist or cannot be recognised, whatever is wrong in the data set.
    """
    kind = kind or _recognise(path)
    if kind not in SOURCES:
        raise InputError(f"--from {kind}: no such kind; there are {', '.join(SOURCES)}")
    source = SOURCES[kind](path, options)
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
        kinds = {".csv": "table", ".tsv": "table", ".parquet": "table", ".json": "llava"}
        if place.suffix in kinds:
            return kinds[place.suffix]
    elif (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        return "datasets"
    elif any(place.glob("*.tar")) or any(place.glob("*/*.tar")):
        return "shards"
    elif any(_is_image(file.name) for file in place.glob("*/**/*")):
        return "folder"
    raise InputError(f"{path}: cannot tell what this is; say --from {'|'.join(SOURCES)}")


def _is_image(name: str) -> bool:
    return name.lower().rpartition(".")[2] in IMAGE_SUFFIXES


def _suffix(name: str) -> str:
    suffix = name.lower().rpartition(".")[2]
    return "jpg" if suffix == "jpeg" else suffix


@dataclass(frozen=True)
class _Files:
    """Reads record i as the picture at paths[i], with its text where there is one."""

    paths: Sequence[Path]
    texts: Sequence[dict[str, bytes]] | None = None

    def __call__(self, index: int) -> dict[str, bytes]:
        path = self.paths[index]
        try:
            files = {_suffix(path.name): path.read_bytes()}
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        return files | (self.texts[index] if self.texts else {})


def _folder(path: str, options: SourceOptions) -> Source:
    """Pictures in one directory per class; the classes are the directories in alphabetical order."""
    root = Path(path)
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(file for file in (root / name).rglob("*") if file.is_file() and _is_image(file.name))
        if not found:
            raise InputError(
                f"{root / name}: no picture (.{', .'.join(IMAGE_SUFFIXES)}) in it; remove or fill the class"
            )
        paths += found
        labels += [label] * len(found)
    names = [file.relative_to(root).as_posix() for file in paths]
    return Source("folder", names, _Files(paths), labels, tuple(classes))


def _table(path: str, options: SourceOptions) -> Source:
    """A CSV, TSV or parquet file with one picture path per row and a class name, a class number or a caption."""
    place = Path(path)
    rows = list(_rows(place))
    columns = list(rows[0]) if rows else []
    image = _column(options.image_column, _IMAGE_COLUMNS, columns, "image", place)
    label = _column(options.label_column, _LABEL_COLUMNS, columns, None, place)
    caption = _column(options.caption_column, _CAPTION_COLUMNS, columns, None, place)
    if (label is None) == (caption is None):
        raise InputError(
            f"{place}: columns {', '.join(columns)}: name one of --label-column and --caption-column, not both or none"
        )
    folder = options.image_folder or place.parent
    paths = [folder / str(row[image]) for row in rows]
    names = [str(row[image]) for row in rows]
    if caption is not None:
        texts = [{"txt": str(row[caption]).encode()} for row in rows]
        return Source("table", names, _Files(paths, texts))
    values = [str(row[label]) for row in rows]
    classes = sorted(set(values), key=lambda value: (not value.isdigit(), int(value) if value.isdigit() else 0, value))
    number = {value: index for index, value in enumerate(classes)}
    return Source("table", names, _Files(paths), [number[value] for value in values], tuple(classes))


def _rows(place: Path) -> Iterator[dict[str, Any]]:
    if place.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise InputError(f"{place}: parquet files need pyarrow: pip install pyarrow") from error
        yield from pyarrow.parquet.read_table(place).to_pylist()
        return
    if place.suffix not in _DELIMITERS:
        raise InputError(f"{place}: a table is a .csv, .tsv or .parquet file")
    try:
        with open(place, newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.DictReader(file, delimiter=_DELIMITERS[place.suffix], strict=True), 2):
                if None in row or None in row.values():
                    raise InputError(f"{place}: row {number} has not as many fields as the head; correct it")
                yield row
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{place}: cannot be read as UTF-8 text with '{_DELIMITERS[place.suffix]}': {error}"
        ) from error


def _column(
    wanted: str | None, usual: Sequence[str], columns: Sequence[str], needed: str | None, place: Path
) -> str | None:
    if wanted is not None:
        if wanted not in columns:
            raise InputError(f"{place}: no column {wanted!r}; there are {', '.join(columns)}")
        return wanted
    found = next((column for name in usual for column in columns if column.lower() == name), None)
    if found is None and needed is not None:
        raise InputError(f"{place}: no column is named like {', '.join(usual)}; say which with --{needed}-column")
    return found


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
                    files[_suffix(suffix)] = file.read(size)
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
    return source


def _label(shard: Path, sample: IndexedSample, classes: int) -> int:
    if "cls" not in sample.files:
        raise InputError(f"{shard}: key {sample.key}: has no .cls, but classnames.txt says that these are classes")
    offset, size = sample.files["cls"]
    with open(shard, "rb") as file:
        file.seek(offset)
        return parse_label(file.read(min(size, LABEL_BYTES + 1)), classes, f"{shard}: key {sample.key}")


def _llava(path: str, options: SourceOptions) -> Source:
    """LLaVA's conversation JSON: a list of {"id", "image", "conversations"}; pictures relative to --image-folder."""
    place = Path(path)
    try:
        records = json.loads(place.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{place}: not a JSON file: {error}") from error
    if not isinstance(records, list):
        raise InputError(f"{place}: must be a list of conversations")
    folder = options.image_folder or place.parent
    paths, texts, names = [], [], []
    for number, record in enumerate(records):
        where = f"{place}: record {number}"
        if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
            raise InputError(f"{where}: needs a list `conversations`")
        if not isinstance(record.get("image"), str):
            raise InputError(
                f"{where}: needs one picture path `image`; text-only and multi-picture records are not shards yet"
            )
        paths.append(folder / record["image"])
        rest = {key: value for key, value in record.items() if key != "image"}
        texts.append({"json": json.dumps(rest, ensure_ascii=False, sort_keys=True).encode()})
        names.append(str(record.get("id", number)))
    return Source("llava", names, _Files(paths, texts))


@dataclass(frozen=True)
class _Pictures:
    """Reads record i of a data set that gives PIL pictures; written without loss."""

    pictures: Any  # indexable

    def __call__(self, index: int) -> dict[str, bytes]:
        buffer = BytesIO()
        picture: Image.Image = self.pictures[index]
        picture.convert("RGB").save(buffer, "PNG")
        return {"png": buffer.getvalue()}


@dataclass(frozen=True)
class _First:
    items: Any

    def __getitem__(self, index: int) -> Image.Image:
        return self.items[index][0]


@dataclass(frozen=True)
class _Column:
    items: Any
    name: str

    def __getitem__(self, index: int) -> Image.Image:
        return self.items[index][self.name]


def _torchvision(path: str, options: SourceOptions) -> Source:
    """torchvision:CLASS:ROOT, for example torchvision:CIFAR10:/data; nothing is downloaded."""
    import torchvision

    parts = path.split(":", 2)
    if len(parts) != 3 or not hasattr(torchvision.datasets, parts[1]):
        raise InputError(f"{path}: write torchvision:CLASS:ROOT with a class of torchvision.datasets")
    make, root = getattr(torchvision.datasets, parts[1]), parts[2]
    train = options.split == "train"
    for arguments in ({"train": train}, {"split": options.split}):
        try:
            items = make(root, **arguments)
            break
        except TypeError:
            continue
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"{path}: {' '.join(str(error).split())}") from error
    else:
        raise InputError(f"{path}: this class takes neither `train` nor `split`")
    labels = getattr(items, "targets", None)
    if labels is None:
        labels = getattr(items, "_labels", None) or getattr(items, "labels", None)
    if labels is None:
        labels = [items[index][1] for index in range(len(items))]
    labels = [int(label) for label in labels]
    classes = getattr(items, "classes", None) or [str(label) for label in range(max(labels) + 1)]
    names = [f"{parts[1]} {index}" for index in range(len(items))]
    classes = tuple(name if isinstance(name, str) else ", ".join(name) for name in classes)
    return Source("torchvision", names, _Pictures(_First(items)), labels, classes)


def _datasets(path: str, options: SourceOptions) -> Source:
    """A Hugging Face data set that was saved to disk (`save_to_disk`)."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{path}: Hugging Face data sets need the package datasets: pip install datasets") from error
    items = datasets.load_from_disk(path)
    if isinstance(items, datasets.DatasetDict):
        if options.split not in items:
            raise InputError(f"{path}: no split {options.split!r}; there are {', '.join(items)}")
        items = items[options.split]
    features, place = items.features, Path(path)
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image = _column(options.image_column, (*images, *_IMAGE_COLUMNS), list(features), "image", place)
    label = _column(options.label_column, _LABEL_COLUMNS, list(features), None, place)
    pictures, names = _Pictures(_Column(items, image)), [f"row {index}" for index in range(len(items))]
    if label is not None:
        values = items[label]
        feature = features[label]
        classes = tuple(getattr(feature, "names", None) or map(str, sorted(set(values))))
        numbers = list(values) if hasattr(feature, "names") else [classes.index(str(value)) for value in values]
        return Source("datasets", names, pictures, numbers, classes)
    caption = _column(options.caption_column, _CAPTION_COLUMNS, list(features), "caption", place)
    return Source("datasets", names, _Captioned(pictures, items, caption))


@dataclass(frozen=True)
class _Captioned:
    pictures: _Pictures
    items: Any
    column: str

    def __call__(self, index: int) -> dict[str, bytes]:
        return {**self.pictures(index), "txt": str(self.items[index][self.column]).encode()}


SOURCES: dict[str, Callable[[str, SourceOptions], Source]] = {
    "folder": _folder,
    "table": _table,
    "shards": _shards,
    "torchvision": _torchvision,
    "datasets": _datasets,
    "llava": _llava,
}
