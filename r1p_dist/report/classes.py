"""Which classes and pictures a run gets right, before and after: correct.jsonl beside the shards that it is about."""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from r1p_dist.data.index import INDEX, index_shard, is_plain_file, parse_index
from r1p_dist.data.pictures import decode_picture
from r1p_dist.data.samples import LABEL_BYTES, is_picture, key_and_suffix
from r1p_dist.data.stream import Task
from r1p_dist.errors import BadSampleError, InputError
from r1p_dist.page.parts import Columns, Fold, Gallery, Heat, HeatCell, Part, Picture, Table, number
from r1p_dist.report.run import RunFiles

CLASSES = 40  # in a table, those that changed most
CONFUSIONS = 8  # in a table
TASKS_WITH_PICTURES = 15
_SIDE = 112  # pixels of an example
_MOST_BYTES = 8 << 20  # of a sample that is shown


@dataclass(frozen=True)
class Judged:
    """A task's samples at two moments, in the order of its shards. before, now: whether each was right."""

    task: Task
    shards: Sequence[Path]
    samples: Sequence[tuple[int, int, int, int]]  # shard, start, stop, label
    before: Sequence[bool]
    now: Sequence[bool]
    confusions: tuple[list[list[int]], list[list[int]]]  # before and now: label, prediction, count, first sample

    @cached_property
    def taken_for(self) -> list[dict[int, str]]:
        """Before and now, the class that a wrong sample was taken for, of those samples that are known."""
        names = self.task.class_names
        return [{first: names[guess] for _, guess, _, first in entries} for entries in self.confusions]


def judged(run: RunFiles) -> list[Judged]:
    """Return the classification tasks whose shards are here and agree with what was evaluated."""
    correct, confusions = run.results("correct"), run.results("confusions")
    last = len(run.matrix.trained)
    split = run.config.get("data", {}).get("evaluate_on", "test")
    found = []
    for name in run.matrix.tasks:
        task, before, now = run.tasks.get(name), correct.get((0, name)), correct.get((last, name))
        if task is None or task.is_instruction or not isinstance(before, str) or not isinstance(now, str) or not last:
            continue
        shards = getattr(task, split)
        if not all(isinstance(shard, Path) for shard in shards):
            continue  # remote: a report fetches nothing
        try:
            samples = [
                (number, *sample)
                for number, shard in enumerate(shards)
                for sample in _samples(shard, shard.stat().st_mtime_ns)
            ]
        except (InputError, OSError, ValueError):
            continue
        # one that could not be read has no mark, and then nobody knows whose the marks are
        if len(samples) == len(before) == len(now) and all(s[3] < len(task.class_names) for s in samples):
            entries = (confusions.get((0, name), []), confusions.get((last, name), []))
            marks = ([mark == "1" for mark in marks] for marks in (before, now))
            found.append(Judged(task, shards, samples, *marks, confusions=entries))
    return found


@lru_cache(maxsize=1024)
def _samples(shard: Path, changed: int) -> list[tuple[int, int, int]]:
    """Returns start, stop and label of each sample. changed: the time of the shard, so that a new one is read anew."""
    index = shard.parent / INDEX
    record = parse_index(index.read_bytes(), str(index)).get(shard.name) if index.is_file() else None
    if record is not None and record.labels is not None:
        return list(zip(record.offsets, record.stops(), record.labels, strict=True))
    with shard.open("rb") as file:

        def label(offset: int, size: int) -> int:
            file.seek(offset)
            return int(file.read(min(size, LABEL_BYTES)))

        return [(sample.start, sample.stop, label(*sample.files["cls"])) for sample in index_shard(shard)]


def classes(tasks: Sequence[Judged]) -> list[Part]:
    """Return a table of classes and one of confusions for each task that is known by class."""
    return [
        Fold(
            f"{task.task.name}: {len(task.task.class_names)} classes",
            [Columns([_class_table(task), *_confusion_table(task)], is_wide=True)],
        )
        for task in tasks
    ]


def _class_table(judged: Judged) -> Heat:
    names = judged.task.class_names
    lines = []
    for label, name in enumerate(names):
        members = [at for at, sample in enumerate(judged.samples) if sample[3] == label]
        if members:
            shares = [100 * sum(marks[at] for at in members) / len(members) for marks in (judged.before, judged.now)]
            lines.append((name, len(members), *shares))
    lines.sort(key=lambda line: -abs(line[3] - line[2]))
    cut = len(lines) > CLASSES
    rows = []
    for name, count, before, now in sorted(lines[:CLASSES], key=lambda line: line[3] - line[2]):
        change = now - before
        cells = [
            HeatCell(number(before)),
            HeatCell(number(now)),
            HeatCell(number(change, signed=True), "", change / 100),
        ]
        rows.append((name, [*cells, HeatCell(str(count))]))
    caption = (
        f"The {CLASSES} classes that changed most, of {len(lines)}." if cut else "From what was lost to what was won."
    )
    columns = ["zero-shot", "last row", "change", "pictures"]
    return Heat(f"accuracy of the classes of {judged.task.name}", columns, rows, ("accuracy",), caption)


def _confusion_table(judged: Judged) -> list[Part]:
    names, (before, now) = judged.task.class_names, judged.confusions
    counts = {(label, guess): count for label, guess, count, _ in before}
    rows = [
        [names[label], names[guess], str(count), str(counts.get((label, guess), "–"))]
        for label, guess, count, _ in now[:CONFUSIONS]
    ]
    header = ["class", "taken for", "pictures", "zero-shot"]
    return (
        [
            Table(
                header,
                rows,
                frozenset({2, 3}),
                caption="Most frequent confusions, last row; a dash: fewer than those that are kept",
            )
        ]
        if rows
        else []
    )


def examples(tasks: Sequence[Judged]) -> list[Part]:
    """Return a few pictures of each task: what was learnt, lost, always right and never."""
    galleries = []
    for task in tasks[:TASKS_WITH_PICTURES]:
        pictures = []
        for before, now in ((False, True), (True, False), (False, False), (True, True)):
            members = [at for at, marks in enumerate(zip(task.before, task.now, strict=True)) if marks == (before, now)]
            # one whose wrong answer is known says more
            known = [at for at in members if (before or at in task.taken_for[0]) and (now or at in task.taken_for[1])]
            if members:
                pictures += _picture(task, (known or members)[0])
        if pictures:
            galleries.append(Gallery(task.task.name, pictures))
    return [Columns(galleries)] if galleries else []


def _picture(judged: Judged, at: int) -> list[Picture]:
    """Returns a sample's picture; nothing where it cannot be read."""
    shard, start, stop, label = judged.samples[at]
    if stop - start > _MOST_BYTES:
        return []
    try:
        with judged.shards[shard].open("rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        image = decode_picture(_first_picture(content), str(judged.shards[shard]))
    except (OSError, BadSampleError, tarfile.TarError):
        return []
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=72)
    name = judged.task.class_names[label]
    moments = zip(("before", "after"), (judged.before[at], judged.now[at]), judged.taken_for, strict=True)
    lines = [f"{moment}: {'right' if right else guesses.get(at, 'wrong')}" for moment, right, guesses in moments]
    return [Picture(buffer.getvalue(), f"a picture of the class {name}", [name, *lines])]


def _first_picture(content: bytes) -> bytes:
    """Returns the picture among the files of one sample; b"" where there is none."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            parts = key_and_suffix(member.name)
            file = tar.extractfile(member) if is_plain_file(member) and parts and is_picture(parts[1]) else None
            if file is not None:
                return file.read()
    return b""
