"""Data sets that other libraries read: torchvision's classes, and Hugging Face data sets saved to disk."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from r1p_dist.data.convert.class_names import class_name, class_numbers, classes_among, named_classes
from r1p_dist.data.convert.pictures import PICTURE
from r1p_dist.data.convert.records import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    LICENCE_COLUMNS,
    Files,
    Source,
    SourceOptions,
    all_licences,
    content_of,
    find_column,
    label_or_caption,
)
from r1p_dist.data.convert.splits import SPLIT_NAMES, by_split
from r1p_dist.errors import BadSampleError, InputError, one_line


@dataclass(frozen=True)
class _Pictures:
    """Reads record i of a torchvision data set that makes its pictures itself; written without loss."""

    items: Any  # indexable: (picture, label)

    def __call__(self, index: int) -> dict[str, bytes]:
        buffer = BytesIO()
        try:
            self.items[index][0].convert("RGB").save(buffer, "PNG")
        except Exception as error:  # PIL's decoders raise many kinds of errors on damaged bytes
            raise BadSampleError(f"record {index}: picture cannot be decoded: {one_line(error)}") from error
        return {PICTURE: buffer.getvalue()}

    def stamp(self, index: int) -> str:
        return ""


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
    classes = named_classes((name if isinstance(name, str) else ", ".join(name) for name in classes), path)
    _check_labels(labels, classes, path)
    files = [pair[0] for pair in pairs or ()]
    files = files or getattr(items, "_image_files", None) or getattr(items, "_images", None) or []
    # Where pictures lie there as files, their bytes can be kept; as PNG they would only grow.
    if len(files) == len(items) and all(isinstance(file, str | Path) for file in files):
        paths = [Path(file) for file in files]
        names = [f"{parts[1]} {index} ({path.name})" for index, path in enumerate(paths)]
        return Source("torchvision", names, Files([(path,) for path in paths]), labels, classes)
    if not isinstance(items[0][0], Image.Image):
        raise InputError(f"{path}: its records are no pictures but {type(items[0][0]).__name__}")
    names = [f"{parts[1]} {index}" for index in range(len(items))]
    return Source("torchvision", names, _Pictures(items), labels, classes)


def _torchvision_items(make: type, root: str, path: str, split: str) -> Any:
    """Opens a split of a torchvision class, which names splits in its own way: `train` yes or no, or `split`."""
    parameters = inspect.signature(make).parameters
    if "train" in parameters:
        if split == "validation":
            raise InputError(f"{path}: has the splits train and test alone")
        choices = [{"train": split == "train"}]
    elif "split" in parameters:
        choices = [{"split": name} for name in SPLIT_NAMES[split]]
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
            raise InputError(
                f"{path}: record {index}: label {label} is outside the {len(classes)} classes; give it one or remove it"
            )


@dataclass(frozen=True)
class _Rows:
    """Reads record i of a Hugging Face data set."""

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
        if self.caption is None:
            return {PICTURE: content}
        if row[self.caption] is None:
            raise BadSampleError(f"{where}: has no caption")
        return {PICTURE: content, "txt": str(row[self.caption]).encode()}

    def stamp(self, index: int) -> str:
        return ""  # to read the row from its mapped file is all that there is to do


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
    called = by_split(splits, path)
    if options.split not in called:
        raise InputError(f"{path}: no split {options.split!r}; there are {', '.join(splits)}")
    splits = {name: split.with_format(None) for name, split in splits.items()}
    items, place = splits[called[options.split]], Path(path)
    features, columns = items.features, items.column_names
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    classed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(images) > 1 and options.image_column is None:
        raise InputError(f"{path}: columns {', '.join(images)} hold pictures; say which one with --image-column")
    image = find_column(options.image_column, (*images, *IMAGE_COLUMNS), columns, place, "image")
    label, caption = label_or_caption(options, (*classed, *LABEL_COLUMNS), columns, place)
    kept = items.select_columns([image] if caption is None else [image, caption])
    try:
        kept = kept.cast_column(image, datasets.Image(decode=False))  # takes paths and bytes as well
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{path}: column {image!r} holds neither pictures nor paths but {features[image]}") from error
    rows = _Rows(kept, image, caption, options.image_folder or place)
    source = Source("datasets", [f"row {index}" for index in range(len(items))], rows)
    if options.split == next(iter(called)):
        for name in splits.keys() - called.values():
            source.left_out.add("row of a split that is neither train, validation nor test", name, len(splits[name]))
    licence = find_column(None, LICENCE_COLUMNS, columns, place)
    source.licences = all_licences(items[licence] if licence is not None else [items.info.license] * len(items))
    if label in classed:
        source.class_names = named_classes(features[label].names, f"{path}: column {label!r}")
        source.labels = [-1 if value is None else value for value in items[label]]
        _check_labels(source.labels, source.class_names, path)
    elif label is not None:
        if not isinstance(features[label], datasets.Value):
            raise InputError(f"{path}: column {label!r} has not one class per row but {features[label]}")
        where = f"{path}: column {label!r}"

        def names(split: Any) -> list[str]:
            return [class_name(value, f"{where}: record {number}") for number, value in enumerate(split[label])]

        # Of all splits: one may lack a class, and every split must count them alike.
        source.class_names = classes_among((name for split in splits.values() for name in names(split)), where)
        source.labels = class_numbers(names(items), source.class_names)
    return source


def splits_of_datasets(path: str) -> tuple[str, ...]:
    """Returns the splits of a saved data set; (): it is a single one."""
    listed = Path(path) / "dataset_dict.json"
    if not listed.is_file():
        return ()
    try:
        return tuple(by_split(json.loads(listed.read_bytes())["splits"], path))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a data set that save_to_disk wrote: {one_line(error)}") from error
