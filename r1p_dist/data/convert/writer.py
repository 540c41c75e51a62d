"""Writes a source as WebDataset shards: the same bytes for the same input, whatever the number of workers.

    OUTPUT/classnames.txt, zeroshot_classification_templates.txt      classification only
    OUTPUT/stream.yaml          classification and conversations
    OUTPUT/SPLIT/000000.tar …   samples in order of their keys
    OUTPUT/SPLIT/0.tar …, nshards.txt, OUTPUT/dataset_type.txt      clip_benchmark's names
    OUTPUT/SPLIT/sizes.json     open_clip's number of samples per shard
    OUTPUT/SPLIT/inputs.json    what each sample was made from: stamps and digests
    OUTPUT/SPLIT/index.json     what was left out, by reason; per shard: samples, bytes, sha256, and each sample's key,
                                offset, crc32 and label, or without classes the length of its text in bytes

Which records go into which shard depends on the source's names and the options alone, so workers write whole shards in
any order. A shard gets its name when it is complete, then a record beside it; a conversion that was killed goes on with
the shards that have none. `index.json` comes last.

A conversion is its input's content, not its names alone: shards whose records changed since they were written are
written again, both when a conversion goes on and when a finished one is asked for again. While that lasts neither
`index.json` nor `stream.yaml` is there, so nobody reads old shards beside new ones.
"""

import hashlib
import json
import multiprocessing
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from r1p_dist.data.convert.inputs import INPUTS, stamps_if_unchanged
from r1p_dist.data.convert.left_out import NOT_CHOSEN, LeftOut
from r1p_dist.data.convert.records import Source
from r1p_dist.data.convert.shard_writer import PARTS, ConvertOptions, part_of, write_shard_of
from r1p_dist.data.convert.tar_shards import CLASS_NAMES, TEMPLATES
from r1p_dist.data.index import INDEX, ShardRecord
from r1p_dist.data.stream import Stream, read_class_names
from r1p_dist.errors import InputError
from r1p_dist.files import write_atomically

_FORMAT = 3
_METRIC = "exact_match"
_PLAN = "plan.json"
_STREAM = "stream.yaml"
_OF_INPUTS = ("licences", "skipped", "left_out", "stamps", "digests")  # of a shard's record, in inputs.json


class _Job(NamedTuple):
    """A shard to write: its number, its records, and the place of the first one in the order."""

    number: int
    records: Sequence[int]
    first: int


def convert(
    source: Source,
    output: Path,
    options: ConvertOptions,
    *,
    name: str,
    metric: str | None = None,
    workers: int = 1,
    is_strict: bool = False,
    together: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda done, all_: None,
) -> dict[str, Any]:
    """Writes the source and returns its index; progress is called with (shards done, shards).

    name: of the task in the stream file. metric: that of conversations, exact_match unless another is given. A record
    whose picture cannot be decoded is left out and listed in the index (`skipped`); all that is left out is counted
    there by reason (`left_out`). is_strict: any loss is an error. together: splits that the same call writes, whose
    classes need not be those of before. InputError: options that do not fit the source or another split, or an output
    that was written from other records or in another way.
    """
    order = choose_records(source, options)
    metric = _metric_of(source, output, metric)
    left_out = LeftOut(source.left_out.as_json())
    if len(order) < len(source):
        left_out.add(NOT_CHOSEN, "...", len(source) - len(order))
    _refuse_losses(left_out, is_strict)
    folder = output / options.split
    plan = _plan(source, options, order)
    jobs = [
        _Job(number, order[start : start + options.shard_samples], start)
        for number, start in enumerate(range(0, len(order), options.shard_samples))
    ]
    others = {path.parent.name for path in output.glob(f"*/{INDEX}")} - {options.split, *together}
    _check_classes(source, output, others)
    parts = _known_parts(folder, plan)
    missing = [job for job in jobs if not _is_current(source, folder, job, parts)]
    is_open = bool(missing) or not (folder / INDEX).is_file()
    if is_open:
        _begin(output, folder, plan, parts)
    _write_texts(source, output)  # names that changed never stand beside an index of before
    if is_open:
        done = len(jobs) - len(missing)
        progress(done, len(jobs))
        _run(source, folder, options, missing, workers, is_strict, lambda more: progress(done + more, len(jobs)))
        parts |= {job.number: _read_json(part_of(folder, job.number)) for job in missing}
    written = [parts[job.number] for job in jobs]
    for part in written:
        left_out += LeftOut(part["left_out"])
    _refuse_losses(left_out, is_strict)
    index = {
        "plan": plan,
        "samples": sum(part["samples"] for part in written),
        "classes": len(source.class_names) if source.class_names else None,
        "licences": sum((Counter(part["licences"]) for part in written), Counter()),
        "left_out": left_out.as_json(),
        "shards": [{key: part[key] for key in ShardRecord.model_fields if key in part} for part in written],
        "skipped": [fault for part in written for fault in part["skipped"]],
    }
    if metric is not None:
        index["metric"] = metric
    if not index["samples"]:
        raise InputError(f"{folder}: not one picture could be decoded; the first fault: {index['skipped'][0]}")
    _finish(folder, index, written)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    if (source.class_names is not None or source.has_conversations) and (missing or not (output / _STREAM).is_file()):
        write_stream(output, name, metric)
    return index


def _metric_of(source: Source, output: Path, metric: str | None) -> str | None:
    """Returns the metric of conversations, which all splits of a task share."""
    if not source.has_conversations:
        if metric is not None:
            raise InputError(f"--metric {metric}: is for conversations, and {source.kind} has none; leave it out")
        return None
    metric = metric or _METRIC
    for path in sorted(output.glob(f"*/{INDEX}")):
        written = _read_json(path).get("metric", metric)
        if written != metric:
            raise InputError(f"{path}: was written for --metric {written}, not {metric}; give that one here as well")
    return metric


def _refuse_losses(left_out: LeftOut, is_strict: bool) -> None:
    if is_strict and left_out.losses:
        lines = "; ".join(left_out.lines(are_losses=True))
        raise InputError(
            f"--strict: {left_out.losses} would be left out: {lines}; mend them or convert without --strict"
        )


def _plan(source: Source, options: ConvertOptions, order: Sequence[int]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for index in order:
        digest.update(source.names[index].encode("utf-8", "surrogatepass") + b"\0")
    task = "conversations" if source.has_conversations else "captions" if source.labels is None else "classes"
    return {
        "format": _FORMAT,
        "kind": source.kind,
        "task": task,
        "options": asdict(options),
        "records": digest.hexdigest(),
    }


def _known_parts(folder: Path, plan: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Returns number -> record of the shards that a finished conversion wrote here, or one that was stopped.

    InputError: its plan is another.
    """
    if (folder / INDEX).is_file():
        index = _read_json(folder / INDEX)
        if index.get("plan") != plan:
            raise InputError(
                f"{folder / INDEX}: was written from other data or with other options; remove {folder} to write it "
                "again, or name another OUTPUT"
            )
        entries = zip(index["shards"], _read_json(folder / INPUTS), strict=True)
        return {number: shard | entry for number, (shard, entry) in enumerate(entries)}
    begun = folder / PARTS / _PLAN
    if begun.is_file() and _read_json(begun) != plan:
        raise InputError(f"{folder}: a conversion of other data or with other options was begun here; remove it")
    return {int(path.stem): _read_json(path) for path in (folder / PARTS).glob("0*.json")}


def _is_current(source: Source, folder: Path, job: _Job, parts: dict[int, dict[str, Any]]) -> bool:
    """Whether a shard is there and made of its records as they are now; brings its record's stamps up to date.

    Forgets the record of one that is not.
    """
    part, shard = parts.get(job.number), folder / f"{job.number:06d}.tar"
    if part is not None and shard.is_file() and shard.stat().st_size == part["bytes"]:
        stamps = stamps_if_unchanged(source, job.records, part)
        if stamps is not None:
            part["stamps"] = stamps
            return True
    parts.pop(job.number, None)
    return False


def _begin(output: Path, folder: Path, plan: dict[str, Any], parts: dict[int, dict[str, Any]]) -> None:
    """Opens a conversion, also one that was finished, with the shards that it can keep."""
    write_atomically(folder / PARTS / _PLAN, json.dumps(plan))
    for path in (folder / PARTS).glob("0*.json"):
        if int(path.stem) not in parts:
            path.unlink()
    for number, part in parts.items():
        if not part_of(folder, number).is_file() or _read_json(part_of(folder, number)) != part:
            write_atomically(part_of(folder, number), json.dumps(part))
    if (folder / INDEX).is_file():
        (output / _STREAM).unlink(missing_ok=True)
        (folder / INDEX).unlink()


def _finish(folder: Path, index: dict[str, Any], parts: Sequence[dict[str, Any]]) -> None:
    """Writes what a finished conversion has beside its shards, unless it is there."""
    inputs = [{key: part[key] for key in _OF_INPUTS} for part in parts]
    is_there = (folder / INDEX).is_file() and (_read_json(folder / INDEX), _read_json(folder / INPUTS)) == (
        index,
        inputs,
    )
    if is_there:
        return
    for number in range(len(parts)):
        alias = folder / f"{number}.tar"
        if not alias.is_symlink():
            alias.symlink_to(f"{number:06d}.tar")
    write_atomically(folder / "nshards.txt", str(len(parts)))
    sizes = {part["name"]: part["samples"] for part in parts}
    write_atomically(folder / "sizes.json", json.dumps(sizes) + "\n")
    write_atomically(folder / INPUTS, json.dumps(inputs, separators=(",", ":")) + "\n")
    write_atomically(folder / INDEX, json.dumps(index, separators=(",", ":")) + "\n")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}; remove {path.parent} and convert again") from error


def choose_records(source: Source, options: ConvertOptions) -> list[int]:
    """Returns the records to write, in order: a permutation by seed, cut to `shots` per class or to `max_samples`."""
    raw = np.random.PCG64(options.seed).random_raw(len(source))  # numpy keeps raw streams the same for ever
    order = np.argsort(raw, kind="stable").tolist()
    if options.shots is not None:
        if source.labels is None:
            raise InputError(f"--shots {options.shots}: the source has no classes ({source.kind})")
        taken = [0] * len(source.class_names)
        kept = []
        for index in order:
            taken[source.labels[index]] += 1
            if taken[source.labels[index]] <= options.shots:
                kept.append(index)
        for label, count in enumerate(taken):
            if count < options.shots:
                raise InputError(f"--shots {options.shots}: class {source.class_names[label]!r} has {count} samples")
        order = kept
    return order[: options.max_samples]


def _check_classes(source: Source, output: Path, others: Collection[str]) -> None:
    """Raises InputError for class names that are not read back as they are written, for their places are the labels.

    And where other splits in OUTPUT have other classes: all splits of a data set have the same.
    """
    if source.class_names is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, CLASS_NAMES)
        write_atomically(copy, _lines(source.class_names))
        try:
            read = read_class_names(copy)
        except InputError:
            read = ()
    if read != source.class_names:
        wrong = next((name for name in source.class_names if name.splitlines() != [name.strip()]), read)
        raise InputError(f"class name {wrong!r}: must be one line that is not empty, without white space at its ends")
    path = output / CLASS_NAMES
    if others and path.is_file() and read_class_names(path) != source.class_names:
        raise InputError(
            f"{path}: another split here has other classes ({', '.join(sorted(others))}); convert all splits from the "
            "same classes"
        )


def _write_texts(source: Source, output: Path) -> None:
    """Writes the class names and prompt templates, or clip_benchmark's word for captions."""
    if source.class_names is None:
        if not source.has_conversations:
            write_atomically(output / "dataset_type.txt", "retrieval\n")
        return
    write_atomically(output / CLASS_NAMES, _lines(source.class_names))
    templates = output / TEMPLATES
    if not templates.is_file():  # the user may have written better ones
        write_atomically(templates, _lines(source.templates or ("a photo of a {c}.",)))


def _lines(texts: Sequence[str]) -> str:
    return "\n".join(texts) + "\n"


def _run(
    source: Source,
    folder: Path,
    options: ConvertOptions,
    jobs: Sequence[_Job],
    workers: int,
    is_strict: bool,
    progress: Callable[[int], None],
) -> None:
    if workers <= 1 or len(jobs) <= 1:
        for done, job in enumerate(jobs, 1):
            _refuse_losses(write_shard_of(source, folder, options, *job), is_strict)
            progress(done)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(jobs)), _set_source, (source, folder, options)) as pool:
        for done, left_out in enumerate(pool.imap_unordered(_work, jobs), 1):
            _refuse_losses(left_out, is_strict)
            progress(done)


_worker: tuple = ()


def _set_source(*job: Any) -> None:
    global _worker
    _worker = job


def _work(job: _Job) -> LeftOut:
    return write_shard_of(*_worker, *job)


def write_stream(output: Path, name: str, metric: str | None) -> None:
    """Writes OUTPUT/stream.yaml, a stream of this one task, once its train and test split are there.

    metric: that of conversations; None: a task of classes.
    """
    entry: dict[str, Any] = {"name": name}
    sizes = {}
    for split in ("train", "validation", "test"):
        path = output / split / INDEX
        if path.is_file():
            index = json.loads(path.read_text(encoding="utf-8"))
            entry[split] = [f"{split}/{shard['name']}" for shard in index["shards"] if shard["samples"]]
            sizes[split] = index["samples"]
    if not {"train", "test"} <= sizes.keys():
        return
    entry |= {"class_names": CLASS_NAMES, "templates": TEMPLATES} if metric is None else {"metric": metric}
    entry["sizes"] = sizes
    content = {"name": name, "tasks": [entry]}
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    write_atomically(output / _STREAM, text)
    Stream.load(output)
