"""The pictures that are to be predicted: which files, and what is seen of them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from r1p_dist.data.convert.folders import is_made_by_system
from r1p_dist.data.convert.pictures import is_picture_name, readable_formats
from r1p_dist.data.pictures import read_picture
from r1p_dist.errors import BadSampleError, InputError

_MOST_BYTES = 1 << 28  # of a file; the pixels that it may have, Pillow limits


def find_pictures(paths: Iterable[Path]) -> Iterator[Path]:
    """Yields the files, for a folder the pictures that lie in it itself, by name. InputError: a folder without any."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        inside = sorted(file for file in path.iterdir() if _is_picture(file))
        if not inside:
            raise InputError(f"{path}: no picture in this folder; folders below it are not looked into, name them")
        yield from inside


def _is_picture(file: Path) -> bool:
    return is_picture_name(file.name) and not is_made_by_system(file.name) and file.is_file()


def open_picture(path: Path) -> Image.Image:
    """Returns a picture of any format that Pillow reads, as training would see it. BadSampleError: there is none."""
    try:
        if not path.is_file():
            raise BadSampleError(f"{path}: {'is no file' if path.exists() else 'no such file'}")
        if path.stat().st_size > _MOST_BYTES:
            raise BadSampleError(f"{path}: larger than {_MOST_BYTES >> 20} MB; save the picture smaller")
        content = path.read_bytes()
    except OSError as error:
        raise BadSampleError(f"{path}: cannot be read: {error.strerror}") from error
    return read_picture(content, str(path), readable_formats()).image
