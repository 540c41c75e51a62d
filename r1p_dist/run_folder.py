"""The run folder: one run at a time writes in it."""

import fcntl
import os
import time
from pathlib import Path

from r1p_dist.errors import InputError

LOCK = ".lock"
_RETRY_S = 1.0


class RunFolder:
    """Holds the folder of a run for this process until it ends; to be made on rank 0.

    InputError: another process holds it, also after patience_s seconds, or nothing can be written there. The lock goes
    with the process, whatever ends it.
    """

    def __init__(self, path: Path, patience_s: float = 0) -> None:
        self.path = path
        until = time.monotonic() + patience_s
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / LOCK, "a+")  # stays open
            while not self._is_locked(is_last_try=time.monotonic() >= until):
                time.sleep(_RETRY_S)
        except BlockingIOError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "an unknown process"
            self._lock.close()
            raise InputError(f"run_dir={path}: {owner} is running in this folder; name another run_dir") from error
        except OSError as error:
            raise InputError(f"run_dir={path}: cannot write in this folder: {error.strerror}") from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        self._lock.flush()

    def _is_locked(self, is_last_try: bool) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if is_last_try:
                raise
            return False
        return True

    def close(self) -> None:
        self._lock.close()
