"""Folders that are there whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from r1p_dist.errors import InputError
from r1p_dist.files import sync


def check_is_free(folder: Path) -> None:
    """Raises InputError where something is in the way: a file, or a folder with content."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise InputError(f"--output {folder}: is there already and not an empty folder; name another or remove it")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to write in; at the end its files are synced and it gets its own name.

    Where an exception leaves the context, nothing of it remains. InputError: `check_is_free`, or it cannot be written.
    """
    check_is_free(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        partial.rename(folder)  # takes the place of an empty folder
        sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"--output {folder}: cannot be written: {error.strerror or error}") from error
        raise
