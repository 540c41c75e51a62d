"""Part d: rank 0 of many, run alone on the card, against what the planner says that it takes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check_parts.case import Report
from r1p_dist.cli import main

TOLERANCE = 0.1


def model(report: Report, name: str, recipe: str, ranks: int, batch: int, checkpointing: bool) -> None:
    """Runs rank 0 of so many under ZeRO-3 in bf16 and compares the highest memory of a step with the planner's."""
    settings = [f"backbone.name={name}", "deepspeed.config=zero3", "train.precision=bf16"]
    settings.append(f"backbone.gradient_checkpointing={str(checkpointing).lower()}")
    file, ranked = report.folder / f"dry-run-{name}.json", ["--ranks", str(ranks), "--batch", str(batch)]
    _r1p(["dry-run", "--recipe", recipe, *ranked, "--json", str(file), *settings])
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
    command = ["plan", "--model", name, "--gpus", str(found["ranks"]), "--zero", str(found["zero_stage"]), *sizes]
    command += ["--batch", str(batch["samples"]), "--recipe", recipe, "--precision", found["precision"]]
    _r1p([*command, "--json", str(file)])
    settings = json.loads(file.read_text())["settings"]
    return next(setting for setting in settings if setting["checkpointing"] == checkpointing)


def _r1p(words: Sequence[str]) -> None:
    """Runs a command in this process, whose memory is this case's alone."""
    if code := main(words):
        raise RuntimeError(f"r1p {words[0]} ended with code {code}")


def _gb(memory: dict[str, int]) -> dict[str, float]:
    return {kind: round(size / 1e9, 2) for kind, size in memory.items()}
