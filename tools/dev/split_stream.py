"""Split a stream of classes: each task into parts of its classes, for a longer stream that no setting was chosen on.

    python tools/dev/split_stream.py mini_mtil streams/mini_mtil_22
    r1p compare --output runs/compare_22 stream=streams/mini_mtil_22

STREAM is a name or a folder, as `stream=` takes it. The seed draws which classes stand together and the order of the
tasks; the same seed gives the same bytes. A part keeps its task's templates, domain and splits of samples.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from r1p_dist.errors import InputError, report_errors

if TYPE_CHECKING:
    from r1p_dist.data.stream import Task


def main(argv: Sequence[str] | None = None) -> int:
    """Split a stream; return 0, or 2 for wrong input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream", metavar="STREAM")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write; must not exist")
    parser.add_argument("--parts", type=int, default=2, help="of each task (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    options = parser.parse_args(argv)
    return report_errors(partial(_split, options))


def _split(options: argparse.Namespace) -> int:
    from r1p_dist.data.stream import Stream  # here, so that --help imports nothing heavy

    if options.output.exists():
        raise InputError(f"{options.output} exists already; remove it or name another folder")
    stream = Stream.load(options.stream)
    for task in stream.tasks:
        if task.is_instruction:
            raise InputError(f"{options.stream}: task {task.name} has instructions, and only classes can be split")
        if not 1 < options.parts <= len(task.class_names) // 2:
            raise InputError(
                f"--parts {options.parts}: must be from 2 to {len(task.class_names) // 2}, so that each part of "
                f"{task.name} has two of its {len(task.class_names)} classes"
            )
    draw = random.Random(options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    # nothing half-written under the final name
    with tempfile.TemporaryDirectory(dir=options.output.parent, prefix=f".{options.output.name}-") as unfinished:
        root = Path(unfinished) / options.output.name
        root.mkdir()
        entries = [entry for task in stream.tasks for entry in _write_parts(root, task, options.parts, draw)]
        draw.shuffle(entries)
        content = {"name": options.output.name, "tasks": entries}
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
        (root / "stream.yaml").write_text(text, encoding="utf-8")
        Stream.load(root)
        os.rename(root, options.output)
    for entry in entries:
        print(f"{entry['name']}: {entry['sizes']}")
    return 0


def _write_parts(root: Path, task: Task, parts: int, draw: random.Random) -> list[dict]:
    """Write the parts of a task; return their entries for stream.yaml."""
    from build_mini_stream import read_samples, write_shard

    from r1p_dist.data.convert.tar_shards import TEMPLATES
    from r1p_dist.data.stream import SPLITS

    labels = list(range(len(task.class_names)))
    draw.shuffle(labels)
    splits = {split: read_samples(shards, task.class_names) for split in SPLITS if (shards := getattr(task, split))}
    entries = []
    for part in range(parts):
        name, chosen = f"{task.name}_{part + 1}", sorted(labels[part::parts])
        folder = root / name
        folder.mkdir()
        (folder / "classnames.txt").write_text("".join(f"{task.class_names[label]}\n" for label in chosen), "utf-8")
        (folder / TEMPLATES).write_text("".join(f"{template}\n" for template in task.templates), "utf-8")
        entry: dict = {"name": name}
        sizes = {}
        for split, samples in splits.items():
            own = [sample for sample in samples if sample.label in chosen]
            for sample in own:
                sample.files["cls"] = str(chosen.index(sample.label)).encode()
            write_shard(folder / f"{split}-000000.tar", own)
            entry[split] = [f"{name}/{split}-000000.tar"]
            sizes[split] = len(own)
        entry |= {"class_names": f"{name}/classnames.txt", "templates": f"{name}/{TEMPLATES}", "sizes": sizes}
        entries.append(entry | ({"domain": task.domain} if task.domain else {}))
    return entries


if __name__ == "__main__":
    sys.exit(main())
