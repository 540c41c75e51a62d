"""The errors that users of the package meet, and the exit codes beside 0, 1 and 2."""

import signal

EXIT_INTERRUPTED = 75  # sysexits.h: temporary failure, try again
EXIT_HANGS = 76


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that names file, key, value and remedy."""


class Interrupted(Exception):
    """A signal asked the run to end; it saved, and the same command resumes there. The message says where."""

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message)
        self.number = number


def one_line(error: object) -> str:
    """Returns what an error of another library says, on one line."""
    return " ".join(str(error).split())
