"""Where samples come from: image folders, tables, tar shards, torchvision, Hugging Face datasets, LLaVA conversations.

A source knows its records without reading pictures, so that they can be chosen, put in order and shared out among
workers first; `read` then gets one record's files. Sources are pickled into the workers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from r1p_dist.data.convert.folders import ARCHIVES, flat_folder, looks_like_pictures, open_folder, split_folders
from r1p_dist.data.convert.libraries import open_datasets, open_torchvision, splits_of_datasets
from r1p_dist.data.convert.llava import open_llava
from r1p_dist.data.convert.records import Source, SourceOptions
from r1p_dist.data.convert.splits import cut
from r1p_dist.data.convert.tables import open_table, splits_of_table
from r1p_dist.data.convert.tar_shards import open_shards, splits_of_shards
from r1p_dist.data.stream import SPLITS
from r1p_dist.errors import InputError

SOURCES: dict[str, Callable[[str, SourceOptions], Source]] = {
    "folder": open_folder,
    "table": open_table,
    "shards": open_shards,
    "torchvision": open_torchvision,
    "datasets": open_datasets,
    "llava": open_llava,
}


def open_source(path: str, kind: str | None, options: SourceOptions) -> Source:
    """Opens a data set, of several splits the one that `options` name; kind None: recognised from what is there.

    InputError: nothing there, a kind that does not exist or cannot be recognised, whatever is wrong in the data set.
    """
    kind = _kind(path, kind)
    with _reading(path, kind):
        source = SOURCES[kind](path, options)
    if not len(source):
        why = "".join(f"; {line}" for line in source.left_out.lines()[:2])
        raise InputError(f"{path}: no samples in it (read as {kind}){why}")
    return source


def open_splits(
    path: str, kind: str | None, options: SourceOptions, split: str | None, shares: Mapping[str, float]
) -> dict[str, Source]:
    """Opens the splits of a data set: the one that is asked for, or all that it has, or else `train` alone.

    shares: split -> part of `train` to cut for it. InputError: as `open_source`; a split to cut that is there already;
    splits with other classes.
    """
    if split is not None and shares:
        raise InputError(f"--split {split}: a share is cut from the training split; leave one of them out")
    kind = _kind(path, kind)
    names = [split] if split is not None else splits_of(path, kind) or ["train"]
    if twice := [name for name in shares if name in names]:
        raise InputError(f"--{twice[0]}-share: {path} has a {twice[0]} split already; leave it out")
    sources = {name: open_source(path, kind, replace(options, split=name)) for name in names}
    if shares:
        if "train" not in sources:
            raise InputError(f"{path}: has no train split to cut from; there are {', '.join(names)}")
        sources |= cut(sources["train"], shares, path)
    for name, source in sources.items():
        first, classes = next(iter(sources.items()))
        if source.class_names != classes.class_names:
            raise InputError(
                f"{path}: {name} and {first} have other classes: "
                f"{_difference(source.class_names or (), classes.class_names or ())}; all splits need the same"
            )
    return {name: sources[name] for name in SPLITS if name in sources}


def splits_of(path: str, kind: str) -> list[str]:
    """Returns the splits that a data set says it has; []: it does not say."""
    with _reading(path, kind):
        if kind == "folder":
            return list(split_folders(Path(path)))
        if kind == "shards":
            return list(splits_of_shards(Path(path)))
        if kind == "table":
            return list(splits_of_table(path))
        return list(splits_of_datasets(path)) if kind == "datasets" else []


@contextmanager
def _reading(path: str, kind: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read as {kind}: {error.strerror or error}") from error


def _difference(names: tuple[str, ...], others: tuple[str, ...]) -> str:
    alone = sorted(set(names) ^ set(others)) or ["their order"]
    return f"{', '.join(alone[:3])}{', ...' if len(alone) > 3 else ''}"


def _kind(path: str, kind: str | None) -> str:
    kind = kind or _recognise(path)
    if kind not in SOURCES:
        raise InputError(f"--from {kind}: no such kind; there are {', '.join(SOURCES)}")
    return kind


def _recognise(path: str) -> str:
    if path.startswith("torchvision:"):
        return "torchvision"
    place = Path(path)
    if not place.exists():
        raise InputError(f"{path}: no such file or folder")
    if place.is_file():
        kinds = {".csv": "table", ".tsv": "table", ".parquet": "table", ".json": "llava", ".jsonl": "llava"}
        if place.suffix.lower() in kinds:
            return kinds[place.suffix.lower()]
        if ARCHIVES.fullmatch(place.name):
            raise InputError(f"{path}: is an archive; unpack it and convert what was in it")
        if place.suffix.lower() == ".tar":
            raise InputError(f"{path}: is one shard; give the folder that it is in, or unpack it if it is an archive")
    elif (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        return "datasets"
    elif any(place.glob("*.tar")) or splits_of_shards(place):
        return "shards"
    elif looks_like_pictures(place):
        return "folder"
    elif any(place.iterdir()):
        raise InputError(flat_folder(place))
    raise InputError(f"{path}: cannot tell what this is; say --from {'|'.join(SOURCES)}")
