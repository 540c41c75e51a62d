"""Programs without the seconds of their imports: `r1p train` on two ranks, a launcher and its ranks, or one function,
forked from the server that `run_distributed` has. They are processes of their own, which signals and kills meet as any
others; how DeepSpeed's launcher, `r1p train --ranks` and SLURM start and end theirs has tests of its own
(test_interrupts.py, test_endings.py, tests/slurm)."""

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from r1p_dist.local_ranks import free_port

RANKS = 2


class ForkedLaunch:
    """What tests need of subprocess.Popen; the ranks' output goes to the end of `log`.

    in_ranks: called in each rank before it trains; stands at the top level of its module.
    """

    def __init__(self, words: Sequence[str], log: Path, in_ranks: Callable[[], None] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        arguments = (list(words), log, in_ranks, dict(os.environ))
        self._launcher = context.Process(target=_launch, args=arguments, daemon=True)  # none outlives the tests
        self._launcher.start()
        assert self._launcher.pid is not None
        self.pid = self._launcher.pid

    @property
    def returncode(self) -> int | None:
        return self._launcher.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Returns the exit code of the first rank that failed, or 0; None where the time is over."""
        self._launcher.join(timeout)
        return self.returncode

    def family(self) -> list[psutil.Process]:
        """The launcher and its ranks, in order."""
        launcher = psutil.Process(self.pid)
        return [launcher, *sorted(launcher.children(), key=lambda rank: rank.pid)]


def _launch(words: list[str], log: Path, in_ranks: Callable[[], None] | None, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    os.environ.update(WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS), LOCAL_SIZE=str(RANKS))
    gc.freeze()
    ranks = set()
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            _rank(rank, words, log, in_ranks)
        ranks.add(pid)
    code = 0
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        code = code or os.waitstatus_to_exitcode(status)
        if code:  # as DeepSpeed's launcher does
            for pid in ranks:
                os.kill(pid, signal.SIGTERM)
    os._exit(code if code >= 0 else 128 - code)


def _rank(rank: int, words: list[str], log: Path, in_ranks: Callable[[], None] | None) -> None:
    from r1p_dist.cli import run_command

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    _print_to(log)
    if in_ranks is not None:
        in_ranks()
    code = run_command("train", words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class ForkedProgram:
    """A function of the top level of its module as a program of its own, which prints to the end of `log`."""

    def __init__(self, function: Callable[..., None], given: Sequence[Any], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        arguments = (function, given, log, dict(os.environ))
        self._process = context.Process(target=_program, args=arguments, daemon=True)  # none outlives the tests
        self._process.start()

    def wait(self, timeout: float | None = None) -> int | None:
        """Returns its exit code; None where the time is over."""
        self._process.join(timeout)
        return self._process.exitcode


def _program(function: Callable[..., None], given: Sequence[Any], log: Path, environment: dict[str, str]) -> None:
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    _print_to(log)
    function(*given)


def _print_to(log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
