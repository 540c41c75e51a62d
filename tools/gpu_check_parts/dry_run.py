"""Part d: rank 0 of many, run alone on the card, against what the planner says that it takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_check_parts.case import ROOT, NotPossibleError, Report

R1P = "import sys; from r1p_dist.cli import main; sys.exit(main())"  # its script may lie outside of the PATH
TOLERANCE = 0.1


def model(report: Report, name: str, recipe: str, ranks: int, batch: int, checkpointing: bool) -> None:
    """Runs rank 0 of so many under ZeRO-3 in bf16 and compares the highest memory of a step with the planner's."""
    settings = [f"backbone.name={name}", "deepspeed.config=zero3", "train.precision=bf16"]
    settings.append(f"backbone.gradient_checkpointing={str(checkpointing).lower()}")
    file, ranked = report.folder / f"dry-run-{name}.json", ["--ranks", str(ranks), "--batch", str(batch)]
    command = [sys.executable, "-c", R1P, "dry-run", "--recipe", recipe, *ranked, "--json", str(file), *settings]
    result = subprocess.run(command, stdout=sys.stdout, stderr=subprocess.PIPE, text=True)
    print(result.stderr, file=sys.stderr)
    if "invalid choice: 'dry-run'" in result.stderr:
        raise NotPossibleError("there is no `r1p dry-run` yet")
    result.check_returncode()
    found = json.loads(file.read_text())
    step = found["phases"]["step"]
    measured, planned = step["memory"]["total"], _planned(report.folder, name, recipe, checkpointing, found)
    figures = {"tensors_gb": measured / 1e9, "planned_gb": planned["memory"]["total"] / 1e9}
    figures["tensors/planned"] = measured / planned["memory"]["total"]
    if step["allocator"] is not None:
        figures["allocator_gb"] = step["allocator"] / 1e9
        figures["allocator/planned"] = step["allocator"] / planned["memory"]["total"]
    figures = {key: round(value, 3) for key, value in figures.items()}
    passed = abs(figures["tensors/planned"] - 1) <= TOLERANCE
    report.check(f"{name}, {ranks} ranks", passed, **figures, by_kind=_gb(step["memory"]), plan=_gb(planned["memory"]))


def _planned(folder: Path, name: str, recipe: str, checkpointing: bool, found: dict[str, Any]) -> dict[str, Any]:
    """Returns the planner's line for a dry run with the same batch."""
    batch, file = found["batch"], folder / f"plan-{name}.json"
    sizes = ["--prompts", str(batch["texts"]), "--prompt-tokens", str(batch["tokens"])]
    if "llava" in name:
        sizes = ["--tokens", str(batch["tokens"])]
    command = [sys.executable, str(ROOT / "tools/plan.py"), "--model", name, "--gpus", str(found["ranks"])]
    command += ["--zero", str(found["zero_stage"]), "--batch", str(batch["samples"]), "--recipe", recipe, *sizes]
    subprocess.run([*command, "--precision", found["precision"], "--json", str(file)], check=True)
    settings = json.loads(file.read_text())["settings"]
    return next(setting for setting in settings if setting["checkpointing"] == checkpointing)


def _gb(memory: dict[str, int]) -> dict[str, float]:
    return {kind: round(size / 1e9, 2) for kind, size in memory.items()}
