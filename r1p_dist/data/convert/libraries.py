"""Data sets that other libraries read: torchvision's classes, and Hugging Face data sets saved to disk."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from r1p_dist.data.convert.records import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    LICENCE_COLUMNS,
    Source,
    SourceOptions,
    all_licences,
    all_texts,
    class_numbers,
    classes_among,
    content_of,
    find_column,
    label_or_caption,
)
from r1p_dist.data.samples import BadSampleError
from r1p_dist.errors import InputError, one_line

# What other libraries call a split.
_SPLITS = {"train": ("train", "trainval"), "validation": ("validation", "val", "valid"), "test": ("test",)}
# What else a picture may be stored as; PIL would run Ghostscript for some of its other formats.
_OTHER_FORMATS = ("BMP", "GIF", "JPEG2000", "PPM", "TIFF")


@dataclass(frozen=True)
class _Stored:
    """Reads record i as the picture at paths[i], which stays as it is stored where shards have its format."""

    paths: Sequence[Path]

    def __call__(self, index: int) -> dict[str, bytes]:
        path = self.paths[index]
        return _as_stored(content_of(path), f"{path.parent.name}/{path.name}")


@dataclass(frozen=True)
class _Pictures:
    """Reads record i of a torchvision data set that makes its pictures itself; written without loss."""

    items: Any  # indexable: (picture, label)

    def __call__(self, index: int) -> dict[str, bytes]:
        try:
            return _png(self.items[index][0])
        except Exception as error:  # PIL's decoders raise many kinds of errors on damaged bytes
            raise BadSampleError(f"record {index}: picture cannot be decoded: {one_line(error)}") from error


def _png(picture: Image.Image) -> dict[str, bytes]:
    buffer = BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return {"png": buffer.getvalue()}


def open_torchvision(path: str, options: SourceOptions) -> Source:
    """torchvision:CLASS:ROOT, for example torchvision:CIFAR10:/data; nothing is downloaded."""
    import torchvision

    parts = path.split(":", 2)
    if len(parts) != 3 or not isinstance(getattr(torchvision.datasets, parts[1], None), type):
        raise InputError(f"{path}: write torchvision:CLASS:ROOT with a class of torchvision.datasets")
    items = _torchvision_items(getattr(torchvision.datasets, parts[1]), parts[2], path, options.split)
    pairs = next((found for name in ("samples", "_samples", "imgs") if (found := getattr(items, name, None))), None)
    found = [getattr(items, name, None) for name in ("targets", "_labels", "labels")]
    labels = next((values for values in found if values is not None), None)
    if labels is None:
        labels = [pair[1] for pair in pairs or (items[index] for index in range(len(items)))]
    try:
        labels = [int(label) for label in labels]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: its records have not one class number each") from error
    classes = getattr(items, "classes", None) or [str(label) for label in range(max(labels, default=-1) + 1)]
    classes = tuple(name if isinstance(name, str) else ", ".join(name) for name in classes)
    _check_labels(labels, classes, path)
    files = [pair[0] for pair in pairs or ()]
    files = files or getattr(items, "_image_files", None) or getattr(items, "_images", None) or []
    names = [f"{parts[1]} {index}" for index in range(len(items))]
    # Where pictures lie there as files, their bytes can be kept; as PNG they would only grow.
    if len(files) == len(items) and all(isinstance(file, str | Path) for file in files):
        return Source("torchvision", names, _Stored([Path(file) for file in files]), labels, classes)
    if not isinstance(items[0][0], Image.Image):
        raise InputError(f"{path}: its records are no pictures but {type(items[0][0]).__name__}")
    return Source("torchvision", names, _Pictures(items), labels, classes)


def _torchvision_items(make: type, root: str, path: str, split: str) -> Any:
    """Opens a split of a torchvision class, which names splits in its own way: `train` yes or no, or `split`."""
    parameters = inspect.signature(make).parameters
    if "train" in parameters:
        if split == "validation":
            raise InputError(f"{path}: has the splits train and test alone")
        choices = [{"train": split == "train"}]
    elif "split" in parameters:
        choices = [{"split": name} for name in _SPLITS[split]]
    else:
        raise InputError(f"{path}: this class has no splits to choose from; convert its pictures with --from folder")
    faults: list[Exception] = []
    for choice in choices:
        try:
            return make(root, **choice)
        except Exception as error:  # it is not there, damaged, has no such split, needs a package: all kinds of errors
            faults.append(error)
    fault = next((error for error in faults if not isinstance(error, ValueError)), faults[0])
    text = one_line(fault).replace("You can use download=True to download it", "nothing is downloaded here")
    raise InputError(f"{path}: {text or type(fault).__name__}") from fault


def _check_labels(labels: Sequence[int], classes: Sequence[str], path: str) -> None:
    for index, label in enumerate(labels):
        if not 0 <= label < len(classes):
            raise InputError(f"{path}: record {index}: label {label} is outside the {len(classes)} classes")


@dataclass(frozen=True)
class _Rows:
    """Reads record i of a Hugging Face data set; a picture stays as it is stored where shards have its format."""

    items: Any  # rows with the two columns alone, the picture as {"bytes", "path"}
    image: str
    caption: str | None
    folder: Path

    def __call__(self, index: int) -> dict[str, bytes]:
        row, where = self.items[index], f"row {index}"
        stored = row[self.image] or {}
        if stored.get("bytes") is None and not stored.get("path"):
            raise BadSampleError(f"{where}: has no picture")
        content = content_of(self.folder / stored["path"]) if stored["bytes"] is None else stored["bytes"]
        files = _as_stored(content, where)
        if self.caption is not None:
            if row[self.caption] is None:
                raise BadSampleError(f"{where}: has no caption")
            files["txt"] = str(row[self.caption]).encode()
        return files


def _as_stored(content: bytes, where: str) -> dict[str, bytes]:
    """Returns the picture as it is, or as PNG where shards do not have its format."""
    if content.startswith(b"\xff\xd8\xff"):
        return {"jpg": content}
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return {"png": content}
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return {"webp": content}
    try:
        with Image.open(BytesIO(content), formats=_OTHER_FORMATS) as picture:
            return _png(picture)
    except UnidentifiedImageError as error:  # its own message names an address in memory
        raise BadSampleError(f"{where}: picture cannot be decoded: of no known format") from error
    except Exception as error:  # PIL's decoders raise many kinds of errors on damaged bytes
        raise BadSampleError(f"{where}: picture cannot be decoded: {one_line(error)}") from error


def open_datasets(path: str, options: SourceOptions) -> Source:
    """A Hugging Face data set that was saved to disk (`save_to_disk`)."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{path}: Hugging Face data sets need the package datasets: pip install datasets") from error
    try:
        loaded = datasets.load_from_disk(path)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a data set that save_to_disk wrote: {one_line(error)}") from error
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {options.split: loaded}
    chosen = next((name for name in _SPLITS[options.split] if name in splits), None)
    if chosen is None:
        raise InputError(f"{path}: no split {options.split!r}; there are {', '.join(splits)}")
    splits = {name: split.with_format(None) for name, split in splits.items()}
    items, place = splits[chosen], Path(path)
    features, columns = items.features, items.column_names
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    classed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    image = find_column(options.image_column, (*images, *IMAGE_COLUMNS), columns, place, "image")
    label, caption = label_or_caption(options, (*classed, *LABEL_COLUMNS), columns, place)
    kept = items.select_columns([image] if caption is None else [image, caption])
    try:
        kept = kept.cast_column(image, datasets.Image(decode=False))  # takes paths and bytes as well
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{path}: column {image!r} holds neither pictures nor paths but {features[image]}") from error
    rows = _Rows(kept, image, caption, options.image_folder or place)
    source = Source("datasets", [f"row {index}" for index in range(len(items))], rows)
    licence = find_column(None, LICENCE_COLUMNS, columns, place)
    source.licences = all_licences(items[licence] if licence is not None else [items.info.license] * len(items))
    if label in classed:
        source.class_names = tuple(features[label].names)
        source.labels = [-1 if value is None else value for value in items[label]]
        _check_labels(source.labels, source.class_names, path)
    elif label is not None:
        if not isinstance(features[label], datasets.Value):
            raise InputError(f"{path}: column {label!r} has not one class per row but {features[label]}")
        values = all_texts(items[label], label, place)
        # Of all splits: one may lack a class, and every split must count them alike.
        source.class_names = classes_among(
            str(value) for split in splits.values() for value in split[label] if value is not None
        )
        source.labels = class_numbers(values, source.class_names)
    return source
