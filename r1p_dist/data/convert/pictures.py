"""Which files are pictures for the converter, and how a picture is written into a shard."""

from __future__ import annotations

import functools
import io
import stat
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from r1p_dist.data.pictures import read_picture

PICTURE = "picture"  # the suffix of a record's picture before its format is known; of several: `0.picture`, ...
_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
# Pillow hands these to Ghostscript or Windows, or knows their names without reading them.
_OTHERS_READ = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})


class WrittenPicture(NamedTuple):
    """A picture as a shard has it. has_more_frames: there were others behind the one that is written."""

    suffix: str
    content: bytes
    has_more_frames: bool


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Returns the formats that Pillow reads by itself."""
    Image.init()
    return tuple(sorted(Image.OPEN.keys() - _OTHERS_READ))


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Returns the suffixes, without a dot, of those formats."""
    formats = readable_formats()
    return frozenset(suffix[1:] for suffix, kind in Image.registered_extensions().items() if kind in formats)


def is_picture_name(name: str) -> bool:
    """Whether a file's name ends like a picture that Pillow reads."""
    return suffix_of(name) in readable_suffixes()


def suffix_of(name: str) -> str:
    """Returns the last suffix of a file's name without its dot, in lower case; empty: it has none."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""


def why_no_picture(path: Path) -> str | None:
    """Returns why a file cannot be a picture, by its name or else its first bytes; None: it can."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "link that leads nowhere" if path.is_symlink() else "file that cannot be read"
    if not stat.S_ISREG(mode):
        return "neither file nor folder"
    if is_picture_name(path.name):
        return None
    try:
        with Image.open(path, formats=readable_formats()):
            return None
    except Image.DecompressionBombError:
        return None  # its own line will say so
    except Exception:  # PIL raises many kinds of errors on what is no picture
        suffix = suffix_of(path.name)
        return f"no picture that Pillow reads ({f'.{suffix}' if suffix else 'no suffix'})"


def written_picture(content: bytes, where: str, resize: int | None, background: str) -> WrittenPicture:
    """Returns a picture as shards have it: its bytes as they are, wherever every reader of shards sees them alike.

    Written again are pictures of other formats than JPEG, PNG and WebP (as PNG), those that only data/pictures.py reads
    right (turned by their EXIF, 16 bits of grey, transparent), and those that get smaller: a JPEG with quality 95, the
    others without loss. resize: the shorter side in pixels. BadSampleError: it cannot be decoded.
    """
    picture = read_picture(content, where, readable_formats(), background)
    suffix = _SUFFIXES.get(picture.format)
    image = picture.image
    if resize is not None and min(image.size) > resize:
        scale = resize / min(image.size)
        size = tuple(max(resize, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
    elif suffix is not None and picture.is_plain:
        return WrittenPicture(suffix, content, picture.is_animated)
    suffix, buffer = suffix or "png", io.BytesIO()
    if suffix == "jpg":
        image.save(buffer, "JPEG", quality=95)
    else:
        image.save(buffer, "PNG" if suffix == "png" else "WEBP", **({"lossless": True} if suffix == "webp" else {}))
    return WrittenPicture(suffix, buffer.getvalue(), picture.is_animated)
