"""Shards at http(s), s3 and other addresses that fsspec opens: fetched once into a folder that processes share.

A file is fetched under another name while its lock is held, checked, and only then gets its name; a lock goes with the
process that held it. So any number of ranks and workers of a machine fetch each file once, and a killed one leaves
nothing that another would take for whole.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from r1p_dist.errors import InputError, one_line
from r1p_dist.files import lock_file, sha256_of

PROTOCOLS = ("http", "https", "s3", "gs", "az", "hf")
_TRIES = 6
_FIRST_WAIT_S = 0.5  # doubled after each try
_SILENCE_S = 60  # a server that sends nothing for so long has failed
_LOCAL_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_Result = TypeVar("_Result")
_logger = logging.getLogger(__name__)


class NotThereError(InputError):
    """The address answers that there is no such file, or none for us."""


def is_url(location: str | Path) -> bool:
    """Tell an address that fsspec opens from a path."""
    return isinstance(location, str) and "://" in location and urlsplit(location).scheme in PROTOCOLS


def read_remote(url: str) -> bytes:
    """Return the content of a small file, never from the cache. NotThereError, or InputError after six tries."""
    return _try_often(url, lambda: _file_system(url).cat_file(url))


class ShardCache:
    """Local copies of remote shards; safe for several processes of a machine.

    folder: None is the user's cache folder. limit_bytes: beyond it, the shards that were not opened for longest are
    removed; None: none is. A process that has such a shard open goes on reading it.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int | None = None) -> None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = folder or caches / "r1p_dist" / "shards"
        self.limit_bytes = limit_bytes

    def open(self, url: str, sha256: str | None = None) -> BinaryIO:
        """Open the local copy of a shard, fetched where it is not there yet; `sha256` is checked then.

        NotThereError; InputError: a library that is missing, other bytes than `sha256` or another failure six times,
        no place in the cache folder.
        """
        name = Path(urlsplit(url).path).name
        path = self.folder / f"{hashlib.sha256(f'{url} {sha256}'.encode()).hexdigest()[:16]}-{name}"
        try:
            with lock_file(_lock_of(path)):
                if not path.is_file():
                    self._fetch(url, path, sha256)
                os.utime(path)
                file = open(path, "rb")
        except OSError as error:
            raise InputError(f"{url}: cannot be kept in {self.folder}: {error}; set data.cache_dir") from error
        if self.limit_bytes is not None:
            self._shrink(self.limit_bytes, path)
        return file

    def _fetch(self, url: str, path: Path, sha256: str | None) -> None:
        partial = path.with_name(f".{path.name}.partial")

        def fetch() -> None:
            _file_system(url).get_file(url, str(partial))
            if sha256 is not None and (found := sha256_of(partial)) != sha256:
                raise ValueError(f"its sha256 is {found}, index.json says {sha256}")

        try:
            _try_often(url, fetch)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _shrink(self, limit: int, newest: Path) -> None:
        shards = []
        for path in self.folder.glob("[!.]*"):
            with suppress(FileNotFoundError):  # another process makes room as well
                facts = path.stat()
                shards.append((facts.st_mtime, facts.st_size, path))
        size = sum(shard_bytes for _, shard_bytes, _ in shards)
        for _, shard_bytes, path in sorted(shards):
            if size <= limit:
                return
            if path != newest:
                with lock_file(_lock_of(path)):
                    path.unlink(missing_ok=True)
                size -= shard_bytes


def _try_often(url: str, action: Callable[[], _Result]) -> _Result:
    attempt = 0
    while True:
        attempt += 1
        try:
            return action()
        except FileNotFoundError as error:
            raise NotThereError(f"{url}: no such file") from error
        except ImportError as error:
            raise InputError(f"{url}: {error}; pip install 'r1p-dist[remote]'") from error
        except Exception as error:  # the libraries below fsspec have errors of their own
            if getattr(error, "errno", None) in _LOCAL_FAULTS:
                raise
            if isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403):
                raise NotThereError(f"{url}: no right to read it: {error}") from error
            reason = one_line(error) or type(error).__name__
            if attempt == _TRIES:
                raise InputError(f"{url}: failed {_TRIES} times, the last time: {reason}") from error
            wait = _FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(1, 1.5)  # many ranks fail at one moment
            _logger.warning("%s: try %d of %d failed (%s), again in %.1f s", url, attempt, _TRIES, reason, wait)
        time.sleep(wait)


def _lock_of(path: Path) -> Path:
    # A file beside it, because the shard itself is not there yet.
    return path.with_name(f".{path.name}.lock")


def _file_system(url: str) -> Any:
    import fsspec

    options: dict[str, Any] = {}
    protocol = urlsplit(url).scheme
    if protocol in ("http", "https"):
        import aiohttp

        # fsspec's own limit of five minutes is for the whole file.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
        options["client_kwargs"] = {"timeout": timeout}
    return fsspec.filesystem(protocol, **options)
