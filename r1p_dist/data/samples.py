"""From the bytes of one sample to its files, picture and label; nothing in a shard is ever run.

The tar bytes of a sample are read by webdataset's own functions, so key and suffix follow it: the base name is cut at
its first dot, suffixes are read in lower case, links and devices are passed over. Only the suffixes of the table below
are looked at: pictures by PIL's JPEG, PNG and WebP decoders, labels as decimal text, anything else (.pkl, .pth) never.
"""

from __future__ import annotations

import io
import re
import warnings

from PIL import Image, UnidentifiedImageError
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from r1p_dist.errors import InputError, one_line

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT_SUFFIXES = ("cls", "txt", "json")
LABEL_BYTES = 32  # a longer file is no label: do not read it
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
_WANTED = {*IMAGE_SUFFIXES, *TEXT_SUFFIXES}


class BadSampleError(InputError):
    """One sample cannot be used, the rest of its shard can; the message names shard, key and reason."""


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """Return webdataset's key and suffix of a member's name; None where it belongs to no sample."""
    key, suffix = base_plus_ext(name)
    # As webdataset does: `__meta__` files and folders belong to no sample.
    return None if key is None or re.match(r"__[^/]*__($|/)", name) else (key, suffix.lower())


def split_sample(content: bytes, key: str, where: str) -> dict[str, bytes]:
    """Return suffix -> bytes of the one sample that `content`, a piece of a tar file, should hold.

    BadSampleError: damaged headers, another key, or files of several samples.
    """
    source = {"url": where, "stream": io.BytesIO(content)}
    try:
        samples = list(group_by_keys(tar_file_expander([source], select_files=_is_wanted)))
    except Exception as error:  # tarfile and webdataset raise many kinds of errors on damaged headers
        raise BadSampleError(f"{where}: damaged header: {one_line(error.args[0] if error.args else error)}") from error
    keys = [sample["__key__"] for sample in samples]
    if keys != [key]:
        found = ", ".join(map(ascii, keys)) or "no file of a sample"
        raise BadSampleError(f"{where}: {found} stands in its place; the shard is damaged or its index.json is old")
    return {suffix: files for suffix, files in samples[0].items() if not suffix.startswith("__")}


def _is_wanted(name: str) -> bool:
    parts = key_and_suffix(name)
    return parts is not None and parts[1] in _WANTED


def picture_suffix(suffixes: dict, where: str) -> str:
    """Return the suffix of a sample's one picture. BadSampleError: none or several."""
    pictures = [suffix for suffix in IMAGE_SUFFIXES if suffix in suffixes]
    if len(pictures) != 1:
        found = f"files {', '.join(f'.{suffix}' for suffix in suffixes)}"
        raise BadSampleError(f"{where}: needs one picture (.{', .'.join(IMAGE_SUFFIXES)}), has {found}")
    return pictures[0]


def parse_label(content: bytes, class_count: int, where: str) -> int:
    """Return the class number in a .cls file. BadSampleError: no number, or outside the classes."""
    text = content.decode("ascii", errors="replace").strip()
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise BadSampleError(f"{where}: label {text[:LABEL_BYTES]!r} is not a class number")
    if int(text) >= class_count:
        raise BadSampleError(f"{where}: label {int(text)} is outside the class list, {class_count} classes from 0")
    return int(text)


def decode_picture(content: bytes, where: str) -> Image.Image:
    """Return a JPEG, PNG or WebP picture as RGB. BadSampleError: damaged, of another kind, or too large to be safe."""
    try:
        with warnings.catch_warnings():
            # Half-way to its limit PIL only warns; a training picture of that size is a bomb as well.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=_IMAGE_FORMATS) as image:
                return image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSampleError(f"{where}: picture too large to decode safely: {error}") from error
    except UnidentifiedImageError as error:  # its own message names an address in memory
        raise BadSampleError(f"{where}: picture cannot be decoded: no {', '.join(_IMAGE_FORMATS)} file") from error
    # PIL's decoders raise many kinds of errors on damaged bytes.
    except Exception as error:
        raise BadSampleError(f"{where}: picture cannot be decoded: {one_line(error)}") from error
