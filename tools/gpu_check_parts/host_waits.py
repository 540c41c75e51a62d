"""Part e: a training step must not make the host wait for the device.

On a card torch itself says where the host waits. Elsewhere the operations are counted that would make it wait there.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from big_model_check import SOURCES, write_stream

from gpu_check_parts.case import ROOT, Report
from r1p_dist import fit
from r1p_dist.host_waits import HostWaits
from r1p_dist.recipes import load_config
from r1p_dist.train import run

STEPS = 5
WARM = 2  # the first steps set up what stays: moments of the optimizer, handles of libraries


def steps(report: Report, recipe: str, must_be_none: bool) -> None:
    """Trains a few steps of a recipe on few samples and looks for waits in all but the first ones and the last."""
    look = _on_card if report.device == "cuda" else _counted
    train_step, found = fit.train_step, Counter()
    number = 0

    def watched(*arguments: Any, **keywords: Any) -> None:
        nonlocal number
        number += 1
        with look(number, found):
            train_step(*arguments, **keywords)

    fit.train_step = watched
    source, tasks = SOURCES[recipe]
    stream = write_stream(report.folder / f"stream-{recipe}", source, tasks[:1])
    settings = f"train.global_batch_size=4 train.iterations={STEPS} log.every_steps={STEPS} checkpoint.every_steps=null"
    own = [f"stream={stream}", f"run_dir={report.folder / f'waits-{recipe}'}"]
    run(load_config(recipe, [*settings.split(), *own]))
    figures = {"steps": number - WARM - 1, "waits": dict(found)}
    if must_be_none:
        report.check(recipe, not found, **figures)
    else:
        report.figures(recipe, **figures)


@contextmanager
def _counted(number: int, found: Counter[str]) -> Iterator[None]:
    """Counts in the steps alone: what the loop prepares between them lies on the host."""
    if not WARM < number < STEPS:
        yield
        return
    with HostWaits() as waits:
        yield
    found.update(waits.calls)


@contextmanager
def _on_card(number: int, found: Counter[str]) -> Iterator[None]:
    """Notes where the host waits, in the steps and between them; before the last one, which is logged, it ends."""

    def note(message: Warning, category: type[Warning], file: str, line: int, *_: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[f"{_own_line()}, {Path(file).name}:{line}"] += 1

    if number == WARM + 1:
        warnings.filterwarnings("always", message="called a synchronizing CUDA operation")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")  # `error` would show the first place alone
    if number == STEPS:
        torch.cuda.set_sync_debug_mode("default")
    yield


def _own_line() -> str:
    """Returns the innermost line of the package on the stack."""
    frame = sys._getframe()
    while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(ROOT / "r1p_dist"):
        frame = frame.f_back
    return "outside of the package" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
