"""What can happen to a run from outside, handled by all ranks together: signals, a loss that is no number, a hang."""

import faulthandler
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from r1p_dist.distributed import rank, sum_over_ranks, world_size
from r1p_dist.errors import EXIT_CTRL_C, EXIT_HANGS
from r1p_dist.host_copy import HostCopy
from r1p_dist.output import error_terminal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
_CHECK_S = 1.0
_LAST_WORDS_S = 5.0  # the first rank that leaves makes the launcher end the others: they shall speak before


class Finding(NamedTuple):
    """What all ranks know of one optimizer step: the signal that any rank got, and whether no rank made its update."""

    step: int
    signal: signal.Signals | None
    not_finite: bool


class StepAgreement:
    """Lets all ranks know, once per step, whether any got a signal or has a loss or gradient that is not finite.

    The host does not wait for the device: what a step found is read after the next one was handed over, on all ranks
    at the same step, and a step that is not finite changes nothing until then (`GuardedAdamW`).
    A signal handler that did more than note the signal could meet the rank in the middle of a collective, and ranks get
    a signal at different steps. A second Ctrl-C ends this rank at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._signals = device, set()
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._step, self._unread = 0, deque[tuple[int, HostCopy]]()
        self._is_exchanged = False  # for this step
        # Several ranks have a launcher. Without it nobody would end them together, or start them again.
        self._launcher = os.getppid() if world_size() > 1 else None
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note_signal) for number in STOP_SIGNALS}

    def _note_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and number in self._signals:
            if rank() == 0:
                print("interrupted: ended at once; the last checkpoint stays", file=error_terminal(), flush=True)
            os._exit(EXIT_CTRL_C)
        self._signals.add(number)

    def close(self) -> None:
        """Lets signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def note(self, loss: torch.Tensor, step: int) -> None:
        """Notes the loss of a micro batch of an optimizer step (a number, for `Finding.step`)."""
        self._bad, self._step = self._bad | ~loss.detach().isfinite(), step

    def exchange(self, gradients_are_finite: torch.Tensor) -> torch.Tensor:
        """Lets all ranks know of this step, and returns 1.0 where its update must not be made, else 0.0; a collective.

        gradients_are_finite: this rank's, a bool (). A launcher that is gone counts as SIGTERM.
        """
        if self._launcher not in (None, os.getppid()):
            self._signals.add(signal.SIGTERM)
        flags = torch.zeros(len(STOP_SIGNALS) + 1, dtype=torch.int32, device=self._device)
        for place, number in enumerate(STOP_SIGNALS):
            if number in self._signals:
                flags[place].fill_(1)
        flags[-1].copy_(self._bad | ~gradients_are_finite.to(self._device))
        sum_over_ranks(flags)
        self._bad, self._is_exchanged = torch.zeros_like(self._bad), True
        self._unread.append((self._step, HostCopy(flags)))
        return (flags[-1] > 0).float()

    def end_step(self) -> None:
        """Is called behind a step's update, on all ranks.

        Where DeepSpeed itself looks at the gradients (bf16 at stage 0, stage 3, clipping), it leaves the update out on
        all ranks when they are not finite; nobody has exchanged anything then.
        """
        if not self._is_exchanged:
            self.exchange(torch.zeros((), dtype=torch.bool, device=self._device))
        self._is_exchanged = False

    def findings(self, keep: int = 0) -> Iterator[Finding]:
        """Yields what is known of the steps that were not read yet, but for the last `keep`."""
        while len(self._unread) > keep:
            step, flags = self._unread.popleft()
            *signals, not_finite = flags.read()
            stop = next((number for number, flag in zip(STOP_SIGNALS, signals, strict=True) if flag), None)
            yield Finding(step, stop, bool(not_finite))

    def stop_signal(self) -> signal.Signals | None:
        """Returns the signal that any rank got; for places outside of steps that all ranks pass."""
        self.exchange(torch.ones((), dtype=torch.bool, device=self._device))
        self._is_exchanged = False
        return list(self.findings())[-1].signal


class Watchdog:
    """Ends this rank when nothing has moved for `limit_s` seconds, with the stacks of its threads.

    A rank that hangs makes all others wait in a collective, so every rank's watchdog speaks: their stacks show which of
    them is elsewhere. They are written to FOLDER/rank-<n>.txt.
    """

    def __init__(self, limit_s: float, folder: Path) -> None:
        self.limit_s, self.folder = limit_s, folder
        self._moved = time.monotonic()
        self._is_over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def moved(self) -> None:
        """Notes that the run goes on."""
        self._moved = time.monotonic()

    def stop(self) -> None:
        self._is_over.set()

    def _watch(self) -> None:
        while not self._is_over.wait(min(_CHECK_S, self.limit_s / 4)):
            if time.monotonic() - self._moved > self.limit_s:
                message = f"error (rank {rank()}): nothing has moved for {self.limit_s:g} s; the stacks of its threads:"
                print(f"{message} {self.folder / f'rank-{rank()}.txt'}", file=error_terminal(), flush=True)
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(self.folder / f"rank-{rank()}.txt", "w") as file:
                    print(message, file=file, flush=True)
                    faulthandler.dump_traceback(file)
                time.sleep(_LAST_WORDS_S)
                os._exit(EXIT_HANGS)
