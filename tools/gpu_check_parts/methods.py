"""Part f: every shipped method on the card against the same run on the CPU, two tasks of the small CLIP.

The second task's losses hold what the first one's end left: moments, projections, what was merged. So equal losses say
that a method's steps and its boundary do the same on both. In bf16 only that a run ends is asked for.
"""

import math
import traceback
from pathlib import Path

from gpu_check_parts.case import Report
from gpu_check_parts.correctness import apart, make_stream, train
from r1p_dist.methods import method_class, shipped_methods

# lr: so small that what one device rounds otherwise does not grow over the steps
SETTINGS = "train.lr=1e-4 checkpoint.every_steps=null"
LOSS = 1e-3  # relative


def reference(report: Report) -> None:
    """Trains the runs that the card's are held against."""
    make_stream(report.folder)
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
        worst = apart(found, report.folder / _name(method, "cpu"))
        report.check(title, worst <= LOSS if precision == "fp32" else math.isfinite(worst), loss=worst)


def _methods(quick: bool) -> list[str]:
    names = [name for name in shipped_methods() if method_class(name).trains]
    return names[:2] if quick else names


def _name(method: str, kind: str) -> str:
    return f"methods/{method}-{kind}"


def _train(folder: Path, method: str, kind: str, precision: str, config: str) -> Path:
    """Returns the folder of the run."""
    own = [f"options.{key}={value}" for key, value in method_class(method).tiny.items()]
    own += [f"method={method}", f"train.precision={precision}", f"deepspeed.config={config}"]
    return train(folder, _name(method, kind), [*SETTINGS.split(), *own])
