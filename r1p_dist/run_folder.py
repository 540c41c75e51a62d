"""The run folder: one run at a time writes in it."""

import fcntl
import os
from pathlib import Path

from r1p_dist.errors import InputError

LOCK = ".lock"


class RunFolder:
    """Holds the folder of a run for this process until it ends; to be made on rank 0.

    InputError: another process holds it, or nothing can be written there. The lock goes with the process, whatever
    ends it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / LOCK, "a+")  # stays open
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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

    def close(self) -> None:
        self._lock.close()
