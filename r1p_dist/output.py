"""What a run prints: its own words on the terminal, and what libraries say in a file of its folder."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from r1p_dist.errors import InputError, known_fault, launched_rank

_LAST_LINES = 20
_streams: dict[str, TextIO] = {}


def terminal() -> TextIO:
    """Returns the stream for a run's own words: standard output, wherever that went before `noise_in`."""
    return _streams.get("out", sys.stdout)


def error_terminal() -> TextIO:
    """Returns the stream for what is wrong: standard error, wherever that went before `noise_in`."""
    return _streams.get("err", sys.stderr)


@contextmanager
def noise_in(path: Path) -> Iterator[None]:
    """Lets this process and those that it starts print into a file, behind what it has, and only us on the terminal.

    DeepSpeed, the compiler that it calls and torch print through the descriptors themselves. Warnings of this package
    come to the terminal, of rank 0. Where the context is left by an error that nobody expects, the last lines of the
    file are printed; by wrong input, a folder that was made for it is removed. Where the file cannot be written, all
    stays as it is: what needs the folder says why.
    """
    is_new = not path.parent.is_dir()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)
    except OSError:
        yield
        return
    start = file.tell()
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    _streams.update(out=os.fdopen(os.dup(1), "w", buffering=1), err=os.fdopen(os.dup(2), "w", buffering=1))
    # those of other ranks would mostly repeat it; they are in the file
    warnings = logging.StreamHandler(_streams["err"] if launched_rank() == 0 else None)
    warnings.setFormatter(logging.Formatter("warning: %(message)s"))
    logging.getLogger("r1p_dist").addHandler(warnings)
    for descriptor in (1, 2):
        os.dup2(file.fileno(), descriptor)
    try:
        yield
    except BaseException as error:
        if is_new and isinstance(error, InputError):
            _remove(path)
        if isinstance(error, SystemExit) or known_fault(error) is not None:
            raise
        sys.stdout.flush()
        lines = path.read_bytes()[start:].decode(errors="replace").splitlines()
        print("\n".join([f"the last lines of {path}:", *lines[-_LAST_LINES:]]), file=_streams["err"])
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, before in zip((1, 2), kept, strict=True):
            os.dup2(before, descriptor)
            os.close(before)
        logging.getLogger("r1p_dist").removeHandler(warnings)
        for stream in _streams.values():
            stream.close()
        _streams.clear()
        file.close()


def _remove(path: Path) -> None:
    """Removes the file and its folder where nothing else is in it."""
    with suppress(OSError):
        if [entry.name for entry in path.parent.iterdir()] == [path.name]:
            path.unlink()
            path.parent.rmdir()
