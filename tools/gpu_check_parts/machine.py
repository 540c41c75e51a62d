"""Not a part: what the check runs on."""

import importlib.metadata
import platform

import torch
from benchmarks.measure import processor

from gpu_check_parts.case import Report

PACKAGES = ("torch", "deepspeed", "transformers", "open_clip_torch", "peft", "triton")


def describe(report: Report) -> None:
    """Notes the card, its memory and driver, the processor and the versions of what matters."""
    figures = {"python": platform.python_version(), "processor": processor(), "cuda": torch.version.cuda}
    figures["versions"] = {name: _version(name) for name in PACKAGES}
    if report.device == "cuda" and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        figures |= {"card": card.name, "memory_gb": round(card.total_memory / 1e9, 1)}
        figures["capability"] = f"{card.major}.{card.minor}"
        figures["multiprocessors"] = card.multi_processor_count
    else:
        figures["card"] = None
    report.figures("machine", **figures)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
