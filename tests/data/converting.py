"""Pictures to convert, and what a conversion wrote."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from r1p_dist.cli import main
from r1p_dist.data.convert.records import Source
from r1p_dist.data.convert.shard_writer import ConvertOptions
from r1p_dist.data.convert.writer import convert

CLASSES = ("ant", "bee", "cat")


def r1p_convert(argv: Sequence[str]) -> int:
    return main(["convert", *argv])


def picture(seed: int, kind: str, size: tuple[int, int] = (24, 16)) -> bytes:
    """A picture of noise, the same for a seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def pixels(content: bytes) -> bytes:
    """What a picture looks like, whatever its format."""
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB").tobytes()


def write_photos(root: Path) -> Path:
    """Three classes with 7, 6 and 5 pictures of three formats, in nested folders and with dots in their names."""
    for label, (name, count) in enumerate(zip(CLASSES, (7, 6, 5), strict=True)):
        for i in range(count):
            suffix, kind = (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))[i % 3]
            path = root / name / ("more" if i > 3 else "") / f"a.{i:02d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(100 * label + i, kind))
    return root


def run(source: Source, output: Path, workers: int = 1, **options: Any) -> dict[str, Any]:
    return convert(source, output, ConvertOptions(**options), name="task", workers=workers)


def contents(output: Path) -> dict[str, bytes]:
    return {
        path.relative_to(output).as_posix(): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()
    }


def members(output: Path, split: str = "train") -> list[tuple[str, bytes]]:
    """The files in the shards of a split, in order."""
    found = []
    for shard in sorted((output / split).glob("??????.tar")):
        with tarfile.open(shard) as tar:
            found += [(member.name, tar.extractfile(member).read()) for member in tar]
    return found


def samples(output: Path, split: str = "train") -> dict[str, dict[str, bytes]]:
    """The samples in the shards of a split: key -> suffix -> content."""
    found: dict[str, dict[str, bytes]] = {}
    for name, content in members(output, split):
        key, _, suffix = name.partition(".")
        found.setdefault(key, {})[suffix] = content
    return found
