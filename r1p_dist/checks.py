"""What can be known of a run before anything heavy is imported: all that it names is there and fits together.

The part `files` of a kind of backbone imports no library of the kind and has
- check_files(config: BackboneConfig), which raises InputError where the model that the section names cannot be there;
- model_in(folder: Path), which returns the `backbone.name` of the model that a folder holds, None for no such model.
"""

import os
import shutil
import tarfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from r1p_dist.config import RunConfig
from r1p_dist.data.stream import Stream, Task
from r1p_dist.errors import InputError
from r1p_dist.kinds import kind_names, kind_of
from r1p_dist.methods import check_method_name
from r1p_dist.trackers import check_trackers

_BLOCK = 512  # bytes of a tar file's header
_MOST_SHARDS = 1000  # of a split; on a network's file system each one costs a trip
_LEAST_FREE_MB = 100
# First bytes of what is taken for a tar file, and what to do about it.
_NO_TAR = {
    b"\x1f\x8b": "is compressed; unpack it with gunzip, shards are plain tar files",
    b"PK": "is a zip file; `r1p convert` makes shards",
    b"version https://git-lfs": "is a pointer of Git LFS; get the file with `git lfs pull`",
    b"<": "is a web page; was its download refused?",
}


def check_run(config: RunConfig, ranks: int = 1) -> None:
    """Checks method, stream, tasks, the first bytes of shards, backbone, ranks and the disk, without importing torch.

    InputError: one line that names what is wrong; what passes may still be refused by those that know more.
    """
    check_method_name(config.method)
    check_trackers(config.log.trackers)
    config.train.micro_batch_size(ranks)
    stream = Stream.load(config.stream, config.order, config.tasks).extended(config.extend)
    stream.check_names(config.train.per_task, "train.per_task")
    _check_kind(config, stream)
    for task in stream.tasks:
        check_split(stream, task, config.data.evaluate_on)
        _check_shards(task)
    if config.data.reference is not None:
        for task in Stream.load(config.data.reference).tasks:
            _check_shards(task)
    kind_of(config.backbone.kind).part("files").check_files(config.backbone)
    _check_disk(config.run_dir)


def check_split(stream: Stream, task: Task, split: str) -> None:
    """InputError: a task has no shards of the split that is evaluated."""
    if not getattr(task, split):
        raise InputError(
            f"{stream.path}: task {task.name}: has no {split} split, on which it is evaluated; write its shards into "
            "the stream, or choose the other: data.evaluate_on=test"
        )


def _check_kind(config: RunConfig, stream: Stream) -> None:
    task = stream.tasks[0]
    if task.is_instruction != kind_of(config.backbone.kind).has_answers:
        holds = "conversations" if task.is_instruction else "pictures of classes"
        fit = [name for name in kind_names() if kind_of(name).has_answers == task.is_instruction]
        raise InputError(
            f"stream={config.stream}: task {task.name} is of {holds}, which need backbone.kind={' or '.join(fit)}, got "
            f"{config.backbone.kind}"
        )


def _check_shards(task: Task) -> None:
    for split in ("train", "validation", "test"):
        local = (shard for shard in getattr(task, split) if isinstance(shard, Path))
        _check_heads(islice(local, _MOST_SHARDS))


def _check_heads(shards: Iterable[Path]) -> None:
    for shard in shards:
        try:
            with shard.open("rb") as file:
                head = file.read(_BLOCK)
        except OSError as error:
            raise InputError(f"{shard}: cannot be read: {error.strerror}") from error
        if not head.strip(b"\0"):
            raise InputError(f"{shard}: empty shard")
        for mark, fault in _NO_TAR.items():
            if head.startswith(mark):
                raise InputError(f"{shard}: {fault}")
        try:
            tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")
        except tarfile.HeaderError as error:
            raise InputError(f"{shard}: is no tar file: {error}") from error


def _check_disk(run_dir: Path) -> None:
    there = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise InputError(f"run_dir={run_dir}: {there} is a file; name another run_dir")
    if not os.access(there, os.W_OK):
        raise InputError(f"run_dir={run_dir}: cannot write in {there}; name another run_dir")
    free = shutil.disk_usage(there).free >> 20
    if free < _LEAST_FREE_MB:
        raise InputError(
            f"run_dir={run_dir}: only {free} MB are free in {there}; make room for checkpoints or name another run_dir"
        )
