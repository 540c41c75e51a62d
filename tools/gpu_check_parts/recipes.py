"""Part b: the small recipes through the launcher, in bf16 on a card; what they learn must beat zero-shot."""

import json
import subprocess
import sys
from collections.abc import Sequence

from gpu_check_parts.case import ROOT, Report, free_port


def smoke(report: Report, recipe: str, settings: Sequence[str] = ()) -> None:
    """Trains a recipe on one rank and compares the mean accuracy at its end with zero-shot's."""
    run_dir = report.folder / recipe
    # the launcher as a module: its script may lie outside of the PATH
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "1"]
    command += ["--master_port", str(free_port())]
    command += [str(ROOT / "launchers/train.py"), "--recipe", recipe, f"run_dir={run_dir}", *settings]
    code = subprocess.run(command).returncode
    if code:
        raise RuntimeError(f"the launcher ended with code {code}")
    metrics = json.loads((run_dir / "metrics.json").read_text())
    zero_shot, end = (sum(row) / len(row) for row in (metrics["accuracy"][0], metrics["accuracy"][-1]))
    report.check(
        recipe,
        end > zero_shot,
        zero_shot=round(zero_shot, 2),
        last=round(end, 2),
        run_seconds=metrics["wall_seconds"],
    )
