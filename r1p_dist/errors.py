"""The errors that users of the package meet, how every program of it prints them, and the exit codes."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable

EXIT_INPUT = 2  # something that was given, or the machine, cannot serve the run as it is
EXIT_INTERRUPTED = 75  # sysexits.h: temporary failure, try again
EXIT_HANGS = 76
EXIT_CTRL_C = 130  # as shells say it: nothing was saved
EXIT_PIPE = 141  # likewise: nobody reads what is printed any more

# Time for rank 0 to print an error that all ranks have, and for the launcher to end the others, before they speak up.
_OTHER_RANKS_WAIT_S = 3.0
_DISK_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EROFS: "mount it for writing",
}
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


def known_fault(error: BaseException) -> tuple[str, int] | None:
    """Returns the line for an error that users meet, and the exit code; None for one that nobody expects."""
    rank = launched_rank()
    prefix = "error" if rank == 0 else f"error (rank {rank})"
    if isinstance(error, Interrupted):
        return f"interrupted: {error}", EXIT_INTERRUPTED
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: Ctrl-C, before there was anything to save", EXIT_CTRL_C
    if isinstance(error, InputError):
        return f"{prefix}: {error}", EXIT_INPUT
    if isinstance(error, OSError) and error.errno in _DISK_REMEDIES:
        remedy = _DISK_REMEDIES[error.errno]
        return f"{prefix}: {error}; {remedy}, the same command then resumes from the last checkpoint", EXIT_INPUT
    # gloo's and NCCL's words; the rank that ended has said why.
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_RANK):
        return f"error (rank {rank}): another rank ended or cannot be reached any more", 1
    return None


def _is_output_read() -> bool:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return False
    return True


def report_errors(command: Callable[[], int]) -> int:
    """Returns what the command returns, or prints its error on one line and returns the exit code for it."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if _is_output_read():
            raise
        # The interpreter flushes once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except (Exception, KeyboardInterrupt) as error:
        if (known := known_fault(error)) is None:
            raise
        line, code = known
        rank = launched_rank()
        if rank and isinstance(error, Interrupted | KeyboardInterrupt):
            return code  # rank 0 speaks for all
        if rank and isinstance(error, InputError):
            time.sleep(_OTHER_RANKS_WAIT_S)
        print(line, file=sys.stderr, flush=True)
        return code
