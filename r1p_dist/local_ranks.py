"""Several ranks on this machine: what `r1p train --ranks N` starts, and how they end together.

As DeepSpeed's launcher does on one node, with a port of its own choice and no words of its own. A signal goes to all
ranks, which save and end together; the first rank that fails ends the others.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from r1p_dist.doctor import ALLOCATOR_VALUE, ALLOCATOR_VARIABLES
from r1p_dist.errors import EXIT_CTRL_C, EXIT_INPUT, EXIT_INTERRUPTED

_LOOK_S = 0.05
_SAVING_S = 60.0  # ranks that were told to end do so together
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def environment(ranks: int) -> dict[str, str]:
    """Returns this process's environment with what ranks on CPUs should find in theirs, where it is not set."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    defaults = {"OMP_NUM_THREADS": str(threads), **dict.fromkeys(ALLOCATOR_VARIABLES, str(ALLOCATOR_VALUE))}
    return defaults | os.environ


def run_ranks(command: Sequence[str], ranks: int) -> int:
    """Runs a command as so many ranks and returns the exit code of the first that failed, or 0.

    A rank that a signal ended is said on one line, with exit code 2. A first Ctrl-C is handed on, so that the ranks
    save; a second one ends them.
    """
    base = environment(ranks) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes: list[subprocess.Popen] = []
    asked: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        asked.append(number)
        for process in processes:
            if asked.count(signal.SIGINT) > 1:
                process.kill()
            elif process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in _FORWARDED}
    try:
        for rank in range(ranks):
            # in a session of its own: the terminal's Ctrl-C comes through here alone
            own = _of_rank(rank, ranks)
            processes.append(subprocess.Popen(command, env={**base, **own}, start_new_session=True))
        return _wait(processes, asked)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _of_rank(rank: int, ranks: int) -> Mapping[str, str]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    own["LOCAL_SIZE"] = ranks  # DeepSpeed's name for it, read by its CPU collectives
    return {name: str(value) for name, value in own.items()}


def _wait(processes: Sequence[subprocess.Popen], asked: Sequence[int]) -> int:
    """Returns the exit code once all ranks have ended, or the first has failed."""
    while True:
        codes = [process.poll() for process in processes]
        if asked.count(signal.SIGINT) > 1:
            print("interrupted: ended at once; the last checkpoint stays", file=sys.stderr, flush=True)
            return EXIT_CTRL_C
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None:
            return _end(processes, failed, asked)
        if None not in codes:
            return 0
        time.sleep(_LOOK_S)


def _end(processes: Sequence[subprocess.Popen], failed: int, asked: Sequence[int]) -> int:
    code = processes[failed].returncode
    was_leaving = -code in asked  # its part was done, and it no longer listened
    if code == EXIT_INTERRUPTED or was_leaving:
        until = time.monotonic() + _SAVING_S
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            time.sleep(_LOOK_S)
    if was_leaving:
        codes = [process.returncode for rank, process in enumerate(processes) if rank != failed]
        return next((each for each in codes if each), 0)
    if code > 0:
        return code
    reason = signal.Signals(-code).name
    hint = "; so the kernel ends what takes too much memory" if -code == signal.SIGKILL else ""
    print(f"error: rank {failed} was ended by {reason}{hint}", file=sys.stderr, flush=True)
    return EXIT_INPUT


def free_port() -> int:
    """Returns a port that no program has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
