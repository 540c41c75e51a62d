"""Part e: a training step must not make the host wait for the device.

On a card torch itself says where the host waits. Elsewhere the operations are counted that would make it wait there.
"""

import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpu_check_parts.case import ROOT, Report
from r1p_dist import train
from r1p_dist.config import RunConfig

STEPS = 4
WARM = 2  # the first steps set up what stays: moments of the optimizer, handles of libraries


def steps(report: Report, recipe: str, must_be_none: bool) -> None:
    """Trains a few steps of a recipe's first task and looks for waits in all but the first steps."""
    watch = _CardWaits() if report.device == "cuda" else _CountedWaits()
    train_micro_batch = train.train_micro_batch
    count = 0

    def watched(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        if count <= WARM:
            return train_micro_batch(*arguments, **keywords)
        with watch.looking():
            return train_micro_batch(*arguments, **keywords)

    train.train_micro_batch = watched
    first = RunConfig.load(recipe).tasks[0]
    settings = [
        f"tasks=[{first}]",
        f"train.iterations={STEPS}",
        f"log.every_steps={STEPS}",
        "checkpoint.every_steps=null",
    ]
    train.run(RunConfig.load(recipe, [*settings, f"run_dir={report.folder / f'waits-{recipe}'}"]))
    found = dict(watch.found)
    if must_be_none:
        report.check(recipe, not found, steps=count - WARM, waits=found)
    else:
        report.figures(recipe, steps=count - WARM, waits=found)


class _CardWaits:
    """Where in this repository the host waited for the card, and how often."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    @contextmanager
    def looking(self):
        torch.cuda.set_sync_debug_mode("warn")  # `error` would show the first place alone
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("always", message="called a synchronizing CUDA operation")
                warnings.showwarning = self._note
                yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def _note(self, message: Warning, category: type[Warning], file: str, line: int, *_: Any) -> None:
        frame = sys._getframe()
        while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(ROOT / "r1p_dist"):
            frame = frame.f_back
        own = "" if frame is None else f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}, "
        self.found[f"{own}{Path(file).name}:{line}"] += 1


class _CountedWaits:
    """Which operations would make the host wait, and how often they ran."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    @contextmanager
    def looking(self):
        from r1p_dist.host_waits import HostWaits

        with HostWaits() as waits:
            yield
        self.found.update(waits.calls)
