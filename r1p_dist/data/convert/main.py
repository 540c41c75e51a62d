"""Convert a data set into WebDataset shards, or check shards that were converted.

    r1p convert photos/train shards --split train --workers 4
    r1p convert photos/test shards --split test
    r1p convert captions.csv shards --image-folder pictures --resize 256
    r1p convert torchvision:CIFAR10:/data shards --split test
    r1p convert questions.jsonl shards --image-folder pictures --metric vqa_accuracy
    r1p convert verify shards
    r1p convert stats shards

INPUT is recognised, or named with --from: an image folder with a directory per class (folder), a CSV, TSV or parquet
file (table), clip_benchmark's layout or img2dataset's output (shards), torchvision:CLASS:ROOT (torchvision), a Hugging
Face data set saved to disk (datasets), LLaVA's conversations as JSON or JSON Lines (llava). With train and test split
there, OUTPUT is a stream of one task: stream=OUTPUT trains on it. A conversion that was stopped goes on when the same
command runs again.

`verify` reads every shard again and compares it with what was written; `stats` prints what OUTPUT has. Parquet files
need pyarrow and saved data sets need datasets: both come with this package's extra [convert].
Exit code 0; 1 when `verify` finds a fault; 2 for wrong input.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1p_dist.arguments import Parser, documented_parser
from r1p_dist.data.stream import METRICS, read_class_names

_COMMANDS = {
    "verify": "Read every shard again: is it as it was written, and does every picture decode.",
    "stats": "Print the samples, classes and licences of each split.",
}


def main(prog: str, argv: Sequence[str]) -> int:
    """Converts, verifies or counts; 1 where a fault was found."""
    if argv[:1] == ["verify"]:
        return _verify(_output_of(prog, "verify", argv[1:]))
    if argv[:1] == ["stats"]:
        return _stats(_output_of(prog, "stats", argv[1:]))
    return _convert(_arguments(prog, argv))


def _output_of(prog: str, command: str, argv: Sequence[str]) -> Path:
    parser = Parser(prog=f"{prog} {command}", description=_COMMANDS[command])
    parser.add_argument("output", type=Path, help="folder of converted shards")
    return parser.parse_args(argv).output


def _arguments(prog: str, argv: Sequence[str]) -> argparse.Namespace:
    parser = documented_parser(prog, __doc__)
    parser.usage = f"{prog} INPUT OUTPUT [options]\n       {prog} verify OUTPUT\n       {prog} stats OUTPUT"
    parser.add_argument("input", metavar="INPUT", help="data set to convert")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write")
    parser.add_argument("--from", dest="kind", metavar="KIND", help="kind of INPUT, where it is not recognised")
    parser.add_argument("--split", default="train", choices=("train", "validation", "test"), help="(train)")
    parser.add_argument("--name", help="of the task (name of OUTPUT)")
    parser.add_argument("--workers", type=_count, default=len(os.sched_getaffinity(0)), help="processes (all cores)")
    which = parser.add_argument_group("what is written")
    which.add_argument("--shard-samples", type=_count, default=1000, metavar="N", help="samples per shard (1000)")
    which.add_argument("--resize", type=_count, metavar="PIXELS", help="shorter side of pictures that are larger")
    which.add_argument("--max-samples", type=_count, metavar="N", help="keep so many")
    which.add_argument("--shots", type=_count, metavar="N", help="keep so many per class")
    which.add_argument("--seed", type=int, default=0, help="which are kept, and their order (0)")
    where = parser.add_argument_group("tables, saved data sets and conversations")
    where.add_argument("--image-column", metavar="NAME", help="pictures or their paths (one with a usual name)")
    where.add_argument("--label-column", metavar="NAME", help="class names or numbers (one with a usual name)")
    where.add_argument("--caption-column", metavar="NAME", help="texts instead of classes (one with a usual name)")
    where.add_argument("--image-folder", type=Path, metavar="DIR", help="what picture paths are relative to")
    where.add_argument("--metric", choices=METRICS, help="of conversations, in stream.yaml (exact_match)")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def _convert(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from r1p_dist.data.convert.sources import SourceOptions, open_source
    from r1p_dist.data.convert.writer import ConvertOptions, convert

    columns = (arguments.image_column, arguments.label_column, arguments.caption_column)
    console = Console(stderr=True)
    with console.status(f"reading {arguments.input}"):
        source = open_source(
            arguments.input, arguments.kind, SourceOptions(*columns, arguments.image_folder, arguments.split)
        )
    options = ConvertOptions(
        arguments.split,
        arguments.shard_samples,
        arguments.resize,
        arguments.max_samples,
        arguments.shots,
        arguments.seed,
    )
    columns = (
        TextColumn(f"{arguments.split} shards"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None)
        index = convert(
            source,
            arguments.output,
            options,
            name=arguments.name or arguments.output.resolve().name,
            metric=arguments.metric,
            workers=arguments.workers,
            progress=lambda done, all_: progress.update(bar, completed=done, total=all_),
        )
    classes = f", {index['classes']} classes" if index["classes"] else ""
    print(f"{arguments.output / arguments.split}: {index['samples']} samples in {len(index['shards'])} shards{classes}")
    for fault in index["skipped"]:
        print(f"left out: {fault}", file=sys.stderr)
    return 0


def _verify(output: Path) -> int:
    from r1p_dist.data.convert.check import verify_shards

    faults = 0
    for fault in verify_shards(output):
        faults += 1
        print(fault)
    print(f"{output}: {f'{faults} faults' if faults else 'every shard is as it was written, every picture decodes'}")
    return 1 if faults else 0


def _stats(output: Path) -> int:
    from r1p_dist.data.convert.check import read_indexes

    for split, index in read_indexes(output).items():
        size = sum(shard["bytes"] for shard in index["shards"])
        classes = index["classes"] if index["classes"] else "no"
        print(
            f"{split}: {index['samples']} samples, {classes} classes, {len(index['shards'])} shards, "
            f"{size / 1e6:.1f} MB, {len(index['skipped'])} left out, from {index['plan']['kind']}"
        )
        if index["classes"]:
            print(f"  classes: {_class_sizes(index, read_class_names(output / 'classnames.txt'))}")
        if index.get("licences"):
            counts = Counter(index["licences"]).most_common()
            print(f"  licences: {', '.join(f'{licence} {count}' for licence, count in counts)}")
    return 0


def _class_sizes(index: dict[str, Any], names: Sequence[str]) -> str:
    counts = Counter(label for shard in index["shards"] for label in shard["labels"])
    sizes = sorted((counts[label], name) for label, name in enumerate(names))
    return "from {} samples ({}) to {} ({})".format(*sizes[0], *sizes[-1])
