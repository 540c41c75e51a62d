"""Part f: every shipped method on the card against the same run on the CPU, two tasks of the small CLIP.

The second task's losses hold what the first one's end left: moments, projections, what was merged. So equal losses say
that a method's steps and its boundary do the same on both. In bf16 only that a run ends is asked for.
"""

import math
import traceback
from pathlib import Path

import torch
from big_model_check import write_stream

from gpu_check_parts.case import Report
from gpu_check_parts.correctness import TASKS, losses_of, strict_fp32
from r1p_dist.methods import method_class, shipped_methods
from r1p_dist.recipes import load_config
from r1p_dist.train import run

# lr: so small that what one device rounds otherwise does not grow over the steps
SETTINGS = "train.iterations=3 train.lr=1e-4 train.global_batch_size=4 log.every_steps=1 checkpoint.every_steps=null"
LOSS = 1e-3  # relative
STREAM = "stream-methods"


def reference(report: Report) -> None:
    """Trains the runs that the card's are held against."""
    write_stream(report.folder / STREAM, "mini_mtil", TASKS)
    for method in _methods(report.quick):
        _train(report.folder, method, "cpu", "fp32", "zero0")


def on_the_card(report: Report, precision: str, config: str) -> None:
    """Trains every method and compares; one that fails does not end the rest."""
    for method in _methods(report.quick):
        title = f"{method}, {precision}, {config}"
        try:
            found = _train(report.folder, method, f"{precision}-{config}", precision, config)
        except Exception as error:
            traceback.print_exc()
            report.check(title, False, reason=f"{type(error).__name__}: {error}".partition("\n")[0])
            continue
        expected = losses_of(_folder(report.folder, method, "cpu"))
        worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
        report.check(title, worst <= LOSS if precision == "fp32" else math.isfinite(worst), loss=worst)


def _methods(quick: bool) -> list[str]:
    names = [name for name in shipped_methods() if method_class(name).trains]
    return names[:2] if quick else names


def _folder(folder: Path, method: str, kind: str) -> Path:
    return folder / "methods" / f"{method}-{kind}"


def _train(folder: Path, method: str, kind: str, precision: str, config: str) -> list[float]:
    """Returns the loss of every step of all tasks."""
    strict_fp32()
    torch.manual_seed(0)
    run_dir = _folder(folder, method, kind)
    own = [f"stream={folder / STREAM / 'stream.yaml'}", f"run_dir={run_dir}", f"method={method}"]
    own += [f"options.{key}={value}" for key, value in method_class(method).tiny.items()]
    own += [f"train.precision={precision}", f"deepspeed.config={config}"]
    run(load_config("mini_mtil_dac", [*SETTINGS.split(), *own]))
    return losses_of(run_dir)
