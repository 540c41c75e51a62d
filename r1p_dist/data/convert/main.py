"""Convert a data set into WebDataset shards, or check shards that were converted.

    r1p convert photos shards --workers 4
    r1p convert photos/test shards --split test
    r1p convert one_folder shards --validation-share 0.1 --test-share 0.2
    r1p convert captions.csv shards --image-folder pictures --resize 256
    r1p convert torchvision:CIFAR10:/data shards --split test
    r1p convert questions.jsonl shards --image-folder pictures --metric vqa_accuracy
    r1p convert verify shards
    r1p convert stats shards

INPUT is recognised, or named with --from: an image folder with a directory per class (folder), a CSV, TSV or parquet
file (table), clip_benchmark's layout or img2dataset's output (shards), torchvision:CLASS:ROOT (torchvision), a Hugging
Face data set saved to disk (datasets), LLaVA's conversations as JSON or JSON Lines (llava). Where INPUT says which
splits it has (photos/train and photos/test, a table's column split, ...), all are converted at once; else it is the
training split, or --split's, and --validation-share and --test-share cut further ones from it, always the same.

Whatever Pillow reads is converted: JPEG, PNG and WebP keep their bytes, all else becomes PNG. Pictures are written
again where other readers of shards would see something else: turned by their EXIF, 16 bits of grey, transparent. Of a
picture with several frames or pages the first one is written. What is not written is counted by reason, in the summary
and in OUTPUT/SPLIT/index.json; --strict makes it an error.

With train and test split there, OUTPUT is a stream of one task: stream=OUTPUT trains on it. The same command again goes
on with a conversion that was stopped, and writes again what was corrected in INPUT since.

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
from typing import TYPE_CHECKING, Any

from r1p_dist.arguments import Parser, documented_parser
from r1p_dist.data.convert.left_out import LeftOut
from r1p_dist.data.stream import METRICS, SPLITS, read_class_names
from r1p_dist.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from r1p_dist.data.convert.records import Source

_COMMANDS = {
    "verify": "Read every shard again: is it as it was written, and does every picture decode.",
    "stats": "Print the samples, classes and licences of each split.",
}
_BACKGROUND_HELP = "behind what is transparent (white)"
_MOST_FAULTS = 20  # lines on the screen


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
    parser.add_argument("--split", choices=SPLITS, help="one alone (all that INPUT says it has, or train)")
    parser.add_argument("--name", help="of the task (name of OUTPUT)")
    parser.add_argument("--workers", type=_count, default=len(os.sched_getaffinity(0)), help="processes (all cores)")
    which = parser.add_argument_group("what is written")
    which.add_argument("--shard-samples", type=_count, default=1000, metavar="N", help="samples per shard (1000)")
    which.add_argument("--resize", type=_count, metavar="PIXELS", help="shorter side of pictures that are larger")
    which.add_argument("--background", type=_colour, default="white", metavar="COLOUR", help=_BACKGROUND_HELP)
    which.add_argument("--validation-share", type=_share, metavar="PART", help="of the training split, 0.1 is a tenth")
    which.add_argument("--test-share", type=_share, metavar="PART", help="of the training split, before the validation")
    which.add_argument("--strict", action="store_true", help="leave nothing out: a loss is an error")
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


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be between 0 and 1")
    return value


def _colour(text: str) -> str:
    from PIL import ImageColor

    try:
        ImageColor.getrgb(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: no colour; write white, black, '#808080' ...") from None
    return text


def _convert(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from r1p_dist.data.convert.sources import SourceOptions, open_splits

    columns = (arguments.image_column, arguments.label_column, arguments.caption_column)
    shares = {"test": arguments.test_share, "validation": arguments.validation_share}
    shares = {split: share for split, share in shares.items() if share is not None}
    if sum(shares.values()) >= 1:
        raise InputError("--validation-share and --test-share: nothing is left to train on; their sum must be below 1")
    console = Console(stderr=True)
    with console.status(f"reading {arguments.input}"):
        options = SourceOptions(*columns, arguments.image_folder)
        sources = open_splits(arguments.input, arguments.kind, options, arguments.split, shares)
    for note in dict.fromkeys(note for source in sources.values() for note in source.notes):
        print(f"{arguments.input}: {note}")
    for split, source in sources.items():
        _convert_split(split, source, tuple(sources), arguments, console)
    return 0


def _convert_split(
    split: str, source: Source, together: Sequence[str], arguments: argparse.Namespace, console: Console
) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from r1p_dist.data.convert.shard_writer import ConvertOptions
    from r1p_dist.data.convert.writer import convert
    from r1p_dist.data.index import INDEX

    options = ConvertOptions(
        split=split,
        shard_samples=arguments.shard_samples,
        resize=arguments.resize,
        background=arguments.background,
        max_samples=arguments.max_samples,
        shots=arguments.shots,
        seed=arguments.seed,
    )
    columns = (
        TextColumn(f"{split} shards"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    folder, again = arguments.output / split, ""
    is_finished = (folder / INDEX).is_file()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None)

        def show(done: int, all_: int) -> None:
            nonlocal again
            if is_finished and not again:
                again = f"{folder}: INPUT has changed, {all_ - done} of {all_} shards are written again"
                console.print(again, soft_wrap=True, markup=False, highlight=False)
            progress.update(bar, completed=done, total=all_)

        index = convert(
            source,
            arguments.output,
            options,
            name=arguments.name or arguments.output.resolve().name,
            metric=arguments.metric,
            workers=arguments.workers,
            is_strict=arguments.strict,
            together=together,
            progress=show,
        )
    _report(folder, index)


def _report(folder: Path, index: dict[str, Any]) -> None:
    """Prints what was written, and the sum of what was not with its reasons."""
    classes = f", {index['classes']} classes" if index["classes"] else ""
    print(f"{folder}: {index['samples']} samples in {len(index['shards'])} shards{classes}")
    left_out = LeftOut(index["left_out"])
    if left_out.total:
        print(f"{folder}: {left_out.total} left out")
        for line in left_out.lines():
            print(f"  {line}")
    for fault in index["skipped"][:_MOST_FAULTS]:
        print(f"left out: {fault}", file=sys.stderr)
    if len(index["skipped"]) > _MOST_FAULTS:
        more = len(index["skipped"]) - _MOST_FAULTS
        print(f"and {more} more, all in {folder / 'index.json'} under skipped", file=sys.stderr)


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
            f"{size / 1e6:.1f} MB, {LeftOut(index.get('left_out')).total} left out, from {index['plan']['kind']}"
        )
        for line in LeftOut(index.get("left_out")).lines():
            print(f"  left out: {line}")
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
