"""Pictures in one folder per class, or per split and class: what is a class, a split, a picture, and what is none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from r1p_dist.data.convert.class_names import class_name, classes_among
from r1p_dist.data.convert.left_out import SYSTEM, LeftOut, printable
from r1p_dist.data.convert.pictures import why_no_picture
from r1p_dist.data.convert.records import Files, Source, SourceOptions
from r1p_dist.data.convert.splits import by_split
from r1p_dist.errors import InputError

ARCHIVES = re.compile(r".*\.(zip|rar|7z|tgz|txz|tbz2?|tar\.[a-z0-9]+|gz|xz|bz2|zst)", re.IGNORECASE)
# Folders and files that systems and tools make, beside all whose names begin with a dot.
_MADE_BY_SYSTEMS = {"__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found"}
_MADE_BY_SYSTEMS |= {"system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}


def open_folder(path: str, options: SourceOptions) -> Source:
    """Pictures in one folder per class, nested as they like; the classes are the folders in alphabetical order.

    Where the folder has a folder per split, it is that of the split.
    """
    root = top = Path(path)
    left_out = LeftOut()
    splits = split_folders(root)
    if splits:
        if options.split not in splits:
            raise InputError(f"{root}: no split {options.split!r}; there are {', '.join(splits)}")
        root = splits[options.split]
        if options.split == next(iter(splits)):
            _count_outside(top, splits, left_out)
    found: dict[str, list[Path]] = {}
    for entry in sorted(root.iterdir()):
        if is_made_by_system(entry.name):
            _count_system(entry, left_out)
        elif not entry.is_dir():
            left_out.add(why_no_picture(entry) or "picture beside the classes' folders", printable(entry.name))
        else:
            pictures = found.setdefault(class_name(entry.name, printable(str(entry))), [])
            before = len(pictures)
            for file in files_below(entry, left_out):
                if why := why_no_picture(file):
                    left_out.add(why, file.relative_to(top).as_posix())
                else:
                    pictures.append(file)
            if len(pictures) == before:
                raise InputError(
                    f"{printable(str(entry))}: no picture that Pillow reads in it; remove or fill the class"
                )
    if not found:
        raise InputError(flat_folder(root))
    classes = classes_among(found, printable(path))
    paths = [(file, label) for label, name in enumerate(classes) for file in sorted(found[name])]
    names = [printable(file.relative_to(top).as_posix()) for file, _ in paths]
    read = Files([(file,) for file, _ in paths])
    return Source("folder", names, read, [label for _, label in paths], classes, left_out=left_out)


def split_folders(root: Path) -> dict[str, Path]:
    """Returns split -> folder of a folder that has them; {}: its folders are classes, one perhaps called train.

    InputError: it has both splits and classes.
    """
    folders = {entry.name: entry for entry in _folders(root)}
    splits = by_split(sorted(folders), root)
    others = [name for name in sorted(folders) if name not in splits.values()]
    has_classes = any(any(_folders(folders[name])) for name in splits.values())
    if not splits or (len(splits) == 1 and others and not has_classes):
        return {}
    mixed = [name for name in others if len(splits) == 1 and has_picture(folders[name])]
    if mixed:
        raise InputError(
            f"{root}: {', '.join(splits.values())} is a split by its name and {', '.join(map(printable, mixed[:3]))} "
            "is none; convert the folder of each split by itself, with --split, or rename the class"
        )
    return {split: folders[name] for split, name in splits.items()}


def flat_folder(root: Path) -> str:
    """Returns what is wrong with a folder that has no folder per class, and what to do."""
    files = [entry for entry in sorted(root.iterdir()) if entry.is_file() and not is_made_by_system(entry.name)]
    place = printable(str(root))
    if archives := [file.name for file in files if ARCHIVES.fullmatch(file.name)]:
        return f"{place}: has {archives[0]}, an archive; unpack it and convert what was in it"
    if tables := [file.name for file in files if file.suffix in (".csv", ".tsv", ".parquet", ".json", ".jsonl")]:
        return f"{place}: has no folder per class but a table; convert that: {place}/{tables[0]} --image-folder {place}"
    count = sum(why_no_picture(file) is None for file in files)
    return (
        f"{place}: has {count} pictures and no folder per class; move them to {place}/CLASS/, or convert a table "
        "(.csv) with the columns path and label"
    )


def has_picture(root: Path) -> bool:
    """Whether there is a picture in a folder or below it."""
    return any(why_no_picture(file) is None for file in files_below(root, LeftOut()))


def files_below(root: Path, left_out: LeftOut, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields the files of a folder and of those in it, linked ones too, in order; counts those that systems made."""
    above = (*above, root.resolve())
    for entry in sorted(root.iterdir()):
        if is_made_by_system(entry.name):
            _count_system(entry, left_out)
        elif not entry.is_dir():
            yield entry
        elif entry.resolve() in above:
            left_out.add("link to a folder that it is in", printable(str(entry)))
        else:
            yield from files_below(entry, left_out, above)


def is_made_by_system(name: str) -> bool:
    """Whether a name is that of a file or folder that no person made."""
    return name.startswith(".") or name.casefold() in _MADE_BY_SYSTEMS


def _folders(root: Path) -> Iterator[Path]:
    return (entry for entry in root.iterdir() if entry.is_dir() and not is_made_by_system(entry.name))


def _count_system(entry: Path, left_out: LeftOut) -> None:
    count = sum(file.is_file() for file in entry.rglob("*")) if entry.is_dir() else 1
    if count:
        left_out.add(SYSTEM, entry.name, count)


def _count_outside(root: Path, splits: dict[str, Path], left_out: LeftOut) -> None:
    for entry in sorted(root.iterdir()):
        if is_made_by_system(entry.name):
            _count_system(entry, left_out)
        elif not entry.is_dir():
            left_out.add("file beside the splits' folders", entry.name)
        elif entry not in splits.values():
            for file in files_below(entry, left_out):
                left_out.add("file outside the splits' folders", file.relative_to(root).as_posix())


def looks_like_pictures(root: Path) -> bool:
    """Whether a folder has pictures in folders of its own."""
    return any(has_picture(folder) for folder in _folders(root))
