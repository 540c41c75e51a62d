"""The errors that users of the package meet, how every program of it prints them, and the exit codes."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable

EXIT_INTERRUPTED = 75  # sysexits.h: temporary failure, try again
EXIT_HANGS = 76

# Time for rank 0 to print an error that all ranks have, and for the launcher to end the others, before they speak up.
_OTHER_RANKS_WAIT_S = 3.0
_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that names file, key, value and remedy."""


class BadSampleError(InputError):
    """One sample cannot be used, the rest of its shard can; the message names shard, key and reason."""


class Interrupted(Exception):
    """A signal asked the run to end; it saved, and the same command resumes there. The message says where."""

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message)
        self.number = number


def one_line(error: object) -> str:
    """Returns what an error of another library says, on one line."""
    return " ".join(str(error).split())


def launched_rank() -> int:
    """Returns the rank that the launcher gave this process; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def report_errors(command: Callable[[], int]) -> int:
    """Returns what the command returns, or prints its error on one line and returns the exit code for it."""
    try:
        return command()
    except Interrupted as error:
        if launched_rank() == 0:
            print(f"interrupted: {error}", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        print(f"error: {error}; the same command resumes from the last checkpoint", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        # gloo's and NCCL's words; the rank that ended has said why.
        if not any(words in str(error) for words in _LOST_RANK):
            raise
        print(
            f"error (rank {launched_rank()}): another rank ended or cannot be reached any more",
            file=sys.stderr,
            flush=True,
        )
        return 1
    except InputError as error:
        rank = launched_rank()
        if rank:
            time.sleep(_OTHER_RANKS_WAIT_S)
        print(f"error: {error}" if rank == 0 else f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        return 2
