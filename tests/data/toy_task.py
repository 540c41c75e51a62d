"""Small tasks of noise pictures, written with plain tarfile."""

import io
import tarfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from r1p_dist.data.stream import Task


def picture(number: int, size: tuple[int, int] = (20, 14), kind: str = "PNG") -> bytes:
    """Return an encoded RGB picture of noise that depends on `number` alone."""
    pixels = np.random.RandomState(number).randint(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    """Write an uncompressed tar with the files in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample_files(number: int, label: int) -> list[tuple[str, bytes]]:
    return [(f"s{number:05d}.png", picture(number)), (f"s{number:05d}.cls", str(label).encode())]


def make_task(folder: Path, name: str, labels: Sequence[int], class_names: Sequence[str], first: int = 0) -> Task:
    """Write a task whose sample i is picture(first + i) with labels[i], over three train shards, and return it.

    Validation has one sample per class and test is the same as train.
    """
    samples = [sample_files(first + index, label) for index, label in enumerate(labels)]
    cuts = [0, len(samples) // 4, len(samples) // 4 + 1, len(samples)]
    shards = [
        write_tar(folder / name / f"train-{number:06d}.tar", sum(samples[start:stop], []))
        for number, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False))
        if stop > start
    ]
    validation = [sample_files(first + 900 + label, label) for label in range(len(class_names))]
    validation_shard = write_tar(folder / name / "validation-000000.tar", sum(validation, []))
    sizes = {"train": len(samples), "validation": len(validation), "test": len(samples)}
    templates = ("a photo of a {c}.", "the {c}")
    return Task(name, tuple(shards), (validation_shard,), tuple(shards), tuple(class_names), templates, sizes, None)


def read_webdataset(shard: Path) -> list[dict]:
    """Return the samples of a shard as plain webdataset gives them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        return list(webdataset.WebDataset(str(shard), shardshuffle=False))
