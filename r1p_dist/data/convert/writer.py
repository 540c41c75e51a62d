"""Writes a source as WebDataset shards: the same bytes for the same input, whatever the number of workers.

    OUTPUT/classnames.txt, zeroshot_classification_templates.txt      classification only
    OUTPUT/stream.yaml          classification and conversations
    OUTPUT/SPLIT/000000.tar …   samples in order of their keys
    OUTPUT/SPLIT/0.tar …, nshards.txt, OUTPUT/dataset_type.txt      clip_benchmark's names
    OUTPUT/SPLIT/sizes.json     open_clip's number of samples per shard
    OUTPUT/SPLIT/index.json     per shard: samples, bytes, sha256, and each sample's key, offset, crc32 and label, or
                                without classes the length of its text in bytes

Which records go into which shard depends on the source and the options alone, so workers write whole shards in any
order. A shard gets its name when it is complete, then a record beside it; a conversion that was killed goes on with the
shards that have none. `index.json` comes last.
"""

import hashlib
import io
import json
import multiprocessing
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from PIL import Image

from r1p_dist.data.convert.sources import TEMPLATES, Source
from r1p_dist.data.index import INDEX, IndexedSample, ShardRecord, index_shard, sample_stops
from r1p_dist.data.samples import BadSampleError, decode_picture, is_picture
from r1p_dist.data.stream import Stream
from r1p_dist.errors import InputError
from r1p_dist.files import atomic_file, sha256_of, write_atomically

_PARTS = ".parts"
_FORMAT = 2
_METRIC = "exact_match"


@dataclass(frozen=True)
class ConvertOptions:
    """How a source is written; everything here decides the bytes of the output.

    shard_samples: records per shard. resize: the shorter side in pixels, larger pictures only. max_samples, shots: keep
    so many, or so many per class. seed: which are kept, and their order.
    """

    split: str = "train"
    shard_samples: int = 1000
    resize: int | None = None
    max_samples: int | None = None
    shots: int | None = None
    seed: int = 0


def convert(
    source: Source,
    output: Path,
    options: ConvertOptions,
    *,
    name: str,
    metric: str | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, all_: None,
) -> dict[str, Any]:
    """Writes the source and returns its index; progress is called with (shards done, shards).

    name: of the task in the stream file. metric: that of conversations, exact_match unless another is given. A picture
    that cannot be decoded is left out and listed in the index (`skipped`). InputError: options that do not fit the
    source or another split, or an output that was written from another one.
    """
    order = choose_records(source, options)
    if source.has_conversations:
        metric = metric or _METRIC
        _check_metric(output, metric)
    elif metric is not None:
        raise InputError(f"--metric {metric}: is for conversations, and {source.kind} has none; leave it out")
    folder = output / options.split
    plan = {"format": _FORMAT, "kind": source.kind, "options": asdict(options), "records": _fingerprint(source, order)}
    finished = folder / INDEX
    if finished.is_file():
        index = json.loads(finished.read_text(encoding="utf-8"))
        if index["plan"] != plan:
            raise InputError(f"{finished}: was written from other data or with other options; name another OUTPUT")
        return index
    parts = folder / _PARTS
    _begin(parts, plan)
    _write_texts(source, output)
    jobs = []
    for number, start in enumerate(range(0, len(order), options.shard_samples)):
        jobs.append((number, order[start : start + options.shard_samples], start))
    missing = [job for job in jobs if not _is_complete(folder, job[0])]
    progress(len(jobs) - len(missing), len(jobs))
    _run(source, folder, options, missing, workers, lambda done: progress(len(jobs) - len(missing) + done, len(jobs)))
    records = [json.loads((parts / f"{number:06d}.json").read_text(encoding="utf-8")) for number, *_ in jobs]
    index = {
        "plan": plan,
        "samples": sum(record["samples"] for record in records),
        "classes": len(source.class_names) if source.class_names else None,
        "licences": sum((Counter(record["licences"]) for record in records), Counter()),
        "shards": [{key: record[key] for key in ShardRecord.model_fields if key in record} for record in records],
        "skipped": [fault for record in records for fault in record["skipped"]],
    }
    if metric is not None:
        index["metric"] = metric
    if not index["samples"]:
        raise InputError(f"{folder}: not one picture could be decoded; the first fault: {index['skipped'][0]}")
    for number in range(len(jobs)):
        alias = folder / f"{number}.tar"
        if not alias.is_symlink():
            alias.symlink_to(f"{number:06d}.tar")
    write_atomically(folder / "nshards.txt", str(len(jobs)))
    sizes = {record["name"]: record["samples"] for record in records}
    write_atomically(folder / "sizes.json", json.dumps(sizes) + "\n")
    write_atomically(finished, json.dumps(index, separators=(",", ":")) + "\n")
    shutil.rmtree(parts)
    if source.class_names is not None or source.has_conversations:
        write_stream(output, name, metric)
    return index


def _check_metric(output: Path, metric: str) -> None:
    """All splits of a task have its one metric, which stands in the stream file once train and test are there."""
    for path in sorted(output.glob(f"*/{INDEX}")):
        written = json.loads(path.read_text(encoding="utf-8")).get("metric", metric)
        if written != metric:
            raise InputError(f"{path}: was written for --metric {written}, not {metric}; give that one here as well")


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


def _fingerprint(source: Source, order: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for index in order:
        label = "" if source.labels is None else source.labels[index]
        digest.update(f"{source.names[index]}\0{label}\n".encode())
    digest.update("\n".join(source.class_names or ()).encode())
    return digest.hexdigest()


def _begin(parts: Path, plan: dict[str, Any]) -> None:
    """Makes the folder of a conversion, or finds the one that was begun with the same plan."""
    parts.mkdir(parents=True, exist_ok=True)
    begun = parts / "plan.json"
    if begun.is_file() and json.loads(begun.read_text(encoding="utf-8")) != plan:
        raise InputError(f"{parts.parent}: a conversion of other data or with other options was begun here; remove it")
    write_atomically(begun, json.dumps(plan))


def _write_texts(source: Source, output: Path) -> None:
    """Writes the class names and prompt templates; all splits of a data set must have the same classes."""
    if source.class_names is None:
        if not source.has_conversations:
            write_atomically(output / "dataset_type.txt", "retrieval\n")  # clip_benchmark's word for captions
        return
    if wrong := [name for name in source.class_names if not name.strip() or "\n" in name]:
        raise InputError(f"class name {wrong[0]!r}: must be one line that is not empty")
    text, path = "\n".join(source.class_names) + "\n", output / "classnames.txt"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"{path}: another split here has other classes; convert all splits from the same classes")
    write_atomically(path, text)
    templates = output / TEMPLATES
    if not templates.is_file():  # the user may have written better ones
        write_atomically(templates, "\n".join(source.templates or ("a photo of a {c}.",)) + "\n")


def _is_complete(folder: Path, number: int) -> bool:
    record, shard = folder / _PARTS / f"{number:06d}.json", folder / f"{number:06d}.tar"
    if not record.is_file() or not shard.is_file():
        return False
    return shard.stat().st_size == json.loads(record.read_text(encoding="utf-8"))["bytes"]


def _run(source, folder, options, jobs, workers: int, progress: Callable[[int], None]) -> None:
    if workers <= 1 or len(jobs) <= 1:
        for done, job in enumerate(jobs, 1):
            write_shard_of(source, folder, options, *job)
            progress(done)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(jobs)), _set_source, (source, folder, options)) as pool:
        for done, _ in enumerate(pool.imap_unordered(_work, jobs), 1):
            progress(done)


_worker: tuple = ()


def _set_source(*job: Any) -> None:
    global _worker
    _worker = job


def _work(job: tuple) -> None:
    write_shard_of(*_worker, *job)


def write_shard_of(
    source: Source, folder: Path, options: ConvertOptions, number: int, records: Sequence[int], first: int
) -> None:
    """Writes shard `number` and its record. first: the place of its first record, which becomes part of the keys."""
    written: list[int] = []
    skipped: list[str] = []
    path = folder / f"{number:06d}.tar"
    with atomic_file(path) as file:
        write_tar(file, _samples(source, options, records, first, written, skipped))
    samples = index_shard(path) if written else []
    starts = [sample.start for sample in samples]
    record = {
        "name": path.name,
        "samples": len(written),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "keys": [sample.key for sample in samples],
        "offsets": starts,
        "crc32": _checksums(path, starts),
        "labels": None if source.labels is None else [source.labels[index] for index in written],
        **({"lengths": [_text_length(sample) for sample in samples]} if source.labels is None else {}),
        "licences": Counter(source.licences[index] for index in written) if source.licences else {},
        "skipped": skipped,
    }
    write_atomically(folder / _PARTS / f"{number:06d}.json", json.dumps(record))


def _text_length(sample: IndexedSample) -> int:
    return next((sample.files[suffix][1] for suffix in ("json", "txt") if suffix in sample.files), 0)


def _checksums(path: Path, starts: Sequence[int]) -> list[int]:
    with open(path, "rb") as file:
        checksums = []
        for start, stop in zip(starts, sample_stops(starts, path.stat().st_size), strict=True):
            file.seek(start)
            checksums.append(zlib.crc32(file.read(stop - start)))
    return checksums


def _samples(
    source: Source,
    options: ConvertOptions,
    records: Sequence[int],
    first: int,
    written: list[int],
    skipped: list[str],
) -> Iterator[dict[str, Any]]:
    """Yields the samples to write and fills the lists of records that were written and of faults."""
    for place, index in enumerate(records, first):
        try:
            files = _prepare(source.read(index), options.resize, source.names[index])
        except BadSampleError as error:
            skipped.append(str(error))
            continue
        if source.labels is not None:
            files["cls"] = str(source.labels[index]).encode()
        written.append(index)
        yield {"__key__": f"s{place:09d}", **files}


def write_tar(file: BinaryIO, samples: Iterable[dict[str, Any]]) -> None:
    """Writes a tar file whose bytes depend on the samples alone, and are those that webdataset's writer makes.

    By our own means, because webdataset imports torch: a worker would take seconds to start.
    """
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for suffix in sorted(sample.keys() - {"__key__"}):
                member = tarfile.TarInfo(f"{sample['__key__']}.{suffix}")
                member.size, member.mode = len(sample[suffix]), 0o444
                member.uname = member.gname = "root"
                tar.addfile(member, io.BytesIO(sample[suffix]))


def _prepare(files: dict[str, bytes], resize: int | None, where: str) -> dict[str, bytes]:
    """Checks that every picture can be decoded, and makes it smaller where that is asked for."""
    return {
        suffix: _prepare_picture(content, suffix.rpartition(".")[2], resize, where) if is_picture(suffix) else content
        for suffix, content in files.items()
    }


def _prepare_picture(content: bytes, kind: str, resize: int | None, where: str) -> bytes:
    picture = decode_picture(content, where)
    if resize is None or min(picture.size) <= resize:
        return content
    scale = resize / min(picture.size)
    size = tuple(max(resize, round(side * scale)) for side in picture.size)
    buffer = io.BytesIO()
    smaller = picture.resize(size, Image.Resampling.BICUBIC)
    if kind == "jpg":
        smaller.save(buffer, "JPEG", quality=95)
    else:
        smaller.save(buffer, "PNG" if kind == "png" else "WEBP", **({"lossless": True} if kind == "webp" else {}))
    return buffer.getvalue()


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
    entry |= {"class_names": "classnames.txt", "templates": TEMPLATES} if metric is None else {"metric": metric}
    entry["sizes"] = sizes
    content = {"name": name, "tasks": [entry]}
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    write_atomically(output / "stream.yaml", text)
    Stream.load(output)
