"""What can happen to a run from outside, handled by all ranks together: signals, a loss that is no number, a hang."""

import faulthandler
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from r1p_dist.distributed import rank, start_sum_over_ranks, sum_over_ranks, world_size
from r1p_dist.errors import EXIT_HANGS

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
_CHECK_S = 1.0
_LAST_WORDS_S = 5.0  # the first rank that leaves makes the launcher end the others: they shall speak before


class StepAgreement:
    """Lets all ranks know, once per step, whether any got a signal or has a loss that is not finite.

    The sum over ranks travels while the backward runs. A signal handler that did more than note the signal could meet
    the rank in the middle of a collective, and ranks get a signal at different steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._signals = device, set()
        # Several ranks have a launcher. Without it nobody would end them together, or start them again.
        self._launcher = os.getppid() if world_size() > 1 else None
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self._signals.add(number)

    def begin(self, loss: torch.Tensor) -> None:
        """Starts the exchange for a step; its result is read by `end`. A launcher that is gone counts as SIGTERM."""
        if self._launcher not in (None, os.getppid()):
            self._signals.add(signal.SIGTERM)
        flags = [number in self._signals for number in STOP_SIGNALS]
        self._flags = torch.tensor([*flags, False], dtype=torch.int32, device=self._device)
        self._flags[-1] = ~loss.detach().isfinite()
        self._pending = start_sum_over_ranks(self._flags)

    def end(self) -> tuple[signal.Signals | None, bool]:
        """Returns the signal that any rank got, and whether any rank's loss is not finite."""
        if self._pending is not None:
            self._pending.wait()
        *flags, not_finite = self._flags.tolist()
        return next((number for number, flag in zip(STOP_SIGNALS, flags, strict=True) if flag), None), bool(not_finite)

    def stop_signal(self) -> signal.Signals | None:
        """Returns the signal that any rank got; for places outside of steps that all ranks pass."""
        self.begin(torch.zeros((), device=self._device))
        return self.end()[0]


class Watchdog:
    """Ends this rank when nothing has moved for `limit_s` seconds, with the stacks of its threads.

    A rank that hangs makes all others wait in a collective, so every rank's watchdog speaks: their stacks show which of
    them is elsewhere. They are written to standard error and to FOLDER/rank-<n>.txt.
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
                print(message, file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.stderr)
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(self.folder / f"rank-{rank()}.txt", "w") as file:
                    print(message, file=file, flush=True)
                    faulthandler.dump_traceback(file)
                time.sleep(_LAST_WORDS_S)
                os._exit(EXIT_HANGS)


def is_finite_on_all_ranks(loss: torch.Tensor) -> bool:
    """Whether every rank's loss is finite; a collective."""
    bad = torch.tensor([not math.isfinite(loss.item())], dtype=torch.int32, device=loss.device)
    return not sum_over_ranks(bad).item()
