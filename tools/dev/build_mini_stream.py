"""Build a stream of WebDataset shards from a folder of small classification tasks.

    python tools/dev/build_mini_stream.py INPUT OUTPUT [--name NAME] [--validation-per-class 4]
        [--order NAME=task,task,...] [--unseen TASK ...]

INPUT has one folder per task with `classnames.txt`, `templates.txt` (`{c}` is the class name), `train-*.tar` and
`test-*.tar` (samples `KEY.jpg|png|webp`, `KEY.cls` and, for whatever else is known, `KEY.json`). OUTPUT becomes a
folder with `stream.yaml` and, per task, train, validation and test shards; the same input gives the same bytes. Tasks
stand in alphabetical order. The stream that is shipped as r1p_dist/assets/mini_mtil was built with

    --order second=emoji_animals,playing_cards,furniture_3d,handwritten_digits,tech_logos,animal_silhouettes,\
object_photos,writing_scripts,fashion,country_flags,planet_surface
    --unseen animal_silhouettes fashion handwritten_digits planet_surface playing_cards writing_scripts
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from r1p_dist.data.stream import Stream, read_class_names, read_templates
from r1p_dist.errors import InputError, report_errors


@dataclass(frozen=True)
class Sample:
    """One sample with its files (suffix -> content); `source` says where the picture is from, if its .json does."""

    key: str
    label: int
    source: str
    files: dict[str, bytes]


def read_samples(shards: Sequence[Path], class_names: Sequence[str]) -> list[Sample]:
    """Return the samples of the shards, sorted by key, each picture decoded once as a check."""
    from r1p_dist.data import ShardDataset  # here, so that --help imports nothing heavy
    from r1p_dist.data.index import index_shard

    dataset = ShardDataset(shards, class_names)
    for index in range(len(dataset)):
        dataset.read(index)
    samples = []
    for shard in shards:
        content = shard.read_bytes()
        for indexed in index_shard(shard):
            files = {suffix: content[offset : offset + size] for suffix, (offset, size) in indexed.files.items()}
            try:
                source = str(json.loads(files.get("json", b"{}")).get("source", ""))
            except (ValueError, AttributeError) as error:
                raise InputError(f"{shard}: key {indexed.key}: .json is not a JSON mapping: {error}") from error
            samples.append(Sample(indexed.key, dataset.labels[len(samples)], source, files))
    return sorted(samples, key=lambda sample: sample.key)


def split_validation(samples: Sequence[Sample], per_class: int) -> tuple[list[Sample], list[Sample]]:
    """Return (train, validation) with `per_class` validation samples of each class, a fixed choice.

    Whole sources are taken first, in an order that all classes share: like a test picture, a validation picture then
    seldom shares its vendor, font or 3D model with the training pictures.
    """

    def rank(sample: Sample) -> list[bytes]:
        return [hashlib.sha256(text.encode()).digest() for text in (sample.source, sample.key)]

    by_class: dict[int, list[Sample]] = {}
    for sample in sorted(samples, key=rank):
        by_class.setdefault(sample.label, []).append(sample)
    chosen = {sample.key for ranked in by_class.values() for sample in ranked[:per_class]}
    train = [sample for sample in samples if sample.key not in chosen]
    return train, [sample for sample in samples if sample.key in chosen]


def write_shard(path: Path, samples: Sequence[Sample]) -> None:
    """Write a shard whose bytes depend on the samples alone."""
    from r1p_dist.data.convert.shard_writer import write_tar

    with open(path, "wb") as file:
        write_tar(file, ({"__key__": sample.key, **sample.files} for sample in samples))


def build_task(source: Path, target: Path, validation_per_class: int) -> dict:
    """Write one task's shards and texts; return its entry for stream.yaml, without its domain."""
    from r1p_dist.data.convert.tar_shards import TEMPLATES

    texts = {"classnames.txt": "classnames.txt", TEMPLATES: "templates.txt"}
    for wanted in texts.values():
        if not (source / wanted).is_file():
            raise InputError(f"{source / wanted} is missing")
    shards = {split: sorted(source.glob(f"{split}-*.tar")) for split in ("train", "test")}
    for split, files in shards.items():
        if not files:
            raise InputError(f"{source}: no {split}-*.tar in it")
    class_names = read_class_names(source / "classnames.txt")
    read_templates(source / "templates.txt")
    train, test = (read_samples(shards[split], class_names) for split in ("train", "test"))
    keys = [sample.key for sample in (*train, *test)]
    if len(set(keys)) != len(keys):
        repeated = next(key for key in sorted(keys) if keys.count(key) > 1)
        raise InputError(f"{source}: key {repeated} stands twice; train and test samples need keys of their own")
    for label, name in enumerate(class_names):
        count = sum(sample.label == label for sample in train)
        if count <= validation_per_class:
            raise InputError(
                f"{shards['train'][0]}: class '{name}' has {count} samples; --validation-per-class="
                f"{validation_per_class} leaves none for training"
            )

    target.mkdir()
    for written, wanted in texts.items():
        shutil.copyfile(source / wanted, target / written)
    train, validation = split_validation(train, validation_per_class)
    entry: dict = {"name": source.name}
    splits = {"train": train, "validation": validation, "test": test}
    splits = {split: samples for split, samples in splits.items() if samples}
    for split, samples in splits.items():
        write_shard(target / f"{split}-000000.tar", samples)
        entry[split] = [f"{source.name}/{split}-000000.tar"]
    entry["class_names"] = f"{source.name}/classnames.txt"
    entry["templates"] = f"{source.name}/{TEMPLATES}"
    entry["sizes"] = {split: len(samples) for split, samples in splits.items()}
    return entry


def build_stream(
    source: Path,
    target: Path,
    *,
    name: str,
    validation_per_class: int,
    orders: dict[str, list[str]],
    unseen: Sequence[str] | None,
) -> Stream:
    """Build the stream in `target`, which must not exist; returns it, loaded again as a check."""
    if not source.is_dir():
        raise InputError(f"{source} is not a folder")
    if target.exists():
        raise InputError(f"{target} exists already; remove it or name another folder")
    folders = sorted(folder for folder in source.iterdir() if folder.is_dir())
    if not folders:
        raise InputError(f"{source}: no task folders in it")
    for task in unseen or ():
        if task not in [folder.name for folder in folders]:
            raise InputError(f"--unseen {task}: no such task; tasks: {', '.join(folder.name for folder in folders)}")

    target.parent.mkdir(parents=True, exist_ok=True)
    # Nothing half-written under the final name.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as unfinished:
        root = Path(unfinished) / target.name
        root.mkdir()
        entries = [build_task(folder, root / folder.name, validation_per_class) for folder in folders]
        if unseen is not None:
            for entry in entries:
                entry["domain"] = "unseen" if entry["name"] in unseen else "seen"
        content = {"name": name, "tasks": entries, **({"orders": orders} if orders else {})}
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
        (root / "stream.yaml").write_text(text, encoding="utf-8")
        try:
            for order in (None, *orders):
                Stream.load(root, order=order)
        except InputError as error:
            raise InputError(str(error).replace(str(root), str(source))) from error
        os.rename(root, target)
    return Stream.load(target)


def _parse_order(text: str) -> tuple[str, list[str]]:
    name, separator, tasks = text.partition("=")
    if not (name and separator and tasks):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=task,task,...")
    return name, tasks.split(",")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="folder with one folder per task")
    parser.add_argument("output", type=Path, help="folder to write; must not exist")
    parser.add_argument("--name", help="name of the stream (default: name of OUTPUT)")
    parser.add_argument(
        "--validation-per-class", type=int, default=4, help="training samples per class to set apart (default: 4)"
    )
    parser.add_argument(
        "--order", type=_parse_order, action="append", default=[], metavar="NAME=task,...", help="a further order"
    )
    parser.add_argument(
        "--unseen",
        nargs="+",
        metavar="TASK",
        help="tasks whose domain the backbone never saw; marks the others as seen",
    )
    options = parser.parse_args(arguments)
    if len({name for name, _ in options.order}) != len(options.order):
        parser.error("--order: give each order its own name")
    if options.validation_per_class < 0:
        parser.error("--validation-per-class must be 0 or more")
    return report_errors(partial(_build, options))


def _build(options: argparse.Namespace) -> int:
    stream = build_stream(
        options.input,
        options.output,
        name=options.name or options.output.name,
        validation_per_class=options.validation_per_class,
        orders=dict(options.order),
        unseen=options.unseen,
    )
    for task in stream.tasks:
        print(f"{task.name}: {len(task.class_names)} classes, {task.sizes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
