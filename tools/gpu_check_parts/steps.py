"""Part c: how fast a training step is on the card, against the frozen model and PEFT's LoRA; a speed fails nothing.

tools/dev/benchmarks/step.py says what is compared; all variants encode one prompt per picture (`same_work`) and share
their frozen weights. samples_per_second and utilisation are those of the median step. Utilisation counts the operations
of the frozen model without recomputation, for every variant, over the card's dense bf16 peak.
"""

import argparse
import gc
import re
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from benchmarks.inference import time_forward
from benchmarks.measure import interleaved, medians, ratio
from benchmarks.models import TINY_LLAVA
from benchmarks.step import count_flops, peak_memory, steps_of, time_ratios
from benchmarks.variants import VARIANTS, Step, Variant, make_variants

from gpu_check_parts.case import Report
from r1p_dist.adapters import AdaptedLinear
from r1p_dist.errors import one_line
from r1p_dist.planner.accelerators import ACCELERATORS

# On an H100; per model and batch.
AIMS = {
    ("ViT-B-16", 32): {"step/limit": 1.3},
    ("ViT-B-16", 256): {"step/limit": 1.1},
    ("ViT-L-14", 64): {"step/limit": 1.1},
    ("ViT-bigG-14", 16): {"step/limit": 1.05},
    ("llava-1.5-7b", 8): {"step/limit": 1.05},
}
AIMS_OF_ALL = {"peft/step": 1.3, "memory step/limit": 1.1, "steady/step": 1.05}
ROUNDS = 15
FLOP_SAMPLES = 2


def tiny(report: Report) -> None:
    """Measures the small models, to try the check itself."""
    model(report, "tiny", 2)
    model(report, TINY_LLAVA, 2, checkpointing=True)


def model(
    report: Report, name: str, batch: int, checkpointing: bool = False, dropout: float = 0.0, compiled: bool = False
) -> None:
    """Measures one model; with activation checkpointing where it does not fit on the card without.

    compiled: train.compile=true against the frozen model, and nothing else.
    """
    measure = _measure_compiled if compiled else _measure
    try:
        measure(report, *_model(report, name, batch, checkpointing, dropout))
        return
    except torch.OutOfMemoryError as error:
        if checkpointing:
            raise
        report.figures(f"{name}, {batch}: out of memory", error=str(error).partition(".")[0])
    gc.collect()  # modules and their hooks hold one another
    torch.cuda.empty_cache()
    measure(report, *_model(report, name, batch, True, dropout))


def _model(
    report: Report, name: str, batch: int, checkpointing: bool, dropout: float
) -> tuple[str, argparse.Namespace]:
    """Returns what the results are called and the benchmarks' arguments."""
    arguments = argparse.Namespace(
        model=name,
        batch=batch,
        dtype="float32" if report.device == "cpu" else "bfloat16",
        device=report.device,
        dropout=dropout,
        dropout_kind="element",
        checkpointing=checkpointing,
    )
    title = f"{name}, {batch}" + (", checkpointing" if checkpointing else "") + (f", dropout {dropout}" * bool(dropout))
    return title, arguments


def _measure(report: Report, title: str, arguments: argparse.Namespace) -> None:
    """Measures first what matters most, so that a case that is stopped has it."""
    variants = make_variants(["limit", "step"], arguments)
    flops = _model_flops(variants["limit"])
    if arguments.checkpointing:
        for variant in variants.values():
            variant.checkpoint_blocks()
    others = ["peft"] * _has_peft() + ["steady"] * variants["limit"].is_clip
    for other in others:
        if (variant := _other(report, title, other, variants["limit"])) is not None:
            variants[other] = variant
    if not _has_peft():
        report.skip(f"{title}: peft", "PEFT is not installed")
    rounds = 1 if report.quick else ROUNDS
    speed = _speed(report, variants, flops, rounds)
    report.figures(title, **speed, **_aims(arguments, speed))
    if report.device != "cpu":  # there it takes a process for each
        memory = {key: peak_memory(arguments, variant, key, "same_work") for key, variant in variants.items()}
        figures = {"memory step/limit": round(memory["step"] / memory["limit"], 3)}
        gb = {key: round(value / 1e9, 2) for key, value in memory.items()}
        report.figures(f"{title}: memory", **figures, gb=gb, **_aims(arguments, figures))
    _forward(report, title, variants["limit"], variants["step"], rounds)


def _measure_compiled(report: Report, title: str, arguments: argparse.Namespace) -> None:
    """Measures what compiling gains; it alone takes longer than the rest of a model."""
    limit = make_variants(["limit"], arguments)["limit"]
    flops = _model_flops(limit)
    if arguments.checkpointing:
        limit.checkpoint_blocks()
    started = time.monotonic()
    if (compiled := _other(report, title, "compiled", limit)) is not None:
        first_s = round(time.monotonic() - started, 1)
        speed = _speed(report, {"limit": limit, "compiled": compiled}, flops, ROUNDS)
        report.figures(f"{title}: compiled", first_step_s=first_s, **speed, **_aims(arguments, speed))


def _other(report: Report, title: str, name: str, limit: Variant) -> Variant | None:
    """Returns a variant after its first step; None, and a failure in the report, where it cannot make one.

    What PEFT or the compiler fails at must not take the other figures along.
    """
    try:
        variant = VARIANTS[name](limit.arguments, limit.weights)
        if limit.arguments.checkpointing:
            variant.checkpoint_blocks()
        variant.step(end_to_end=False)
    except Exception as error:
        report.check(f"{title}: {name}", False, reason=f"{type(error).__name__}: {one_line(error)}")
        return None
    return variant


def _speed(report: Report, variants: Mapping[str, Variant], flops: float, rounds: int) -> dict[str, Any]:
    """Returns ratios, samples per second and utilisation; flops: of a step, those of the frozen model."""
    limit = variants["limit"]
    seconds = interleaved(steps_of(variants, "same_work"), rounds, limit.device, limit_s=report.seconds_left / 4)
    times, batch, peak = medians(seconds), limit.arguments.batch, peak_flops(report.device)
    speed: dict[str, Any] = {"rounds": len(seconds["limit"]), **_rounded(time_ratios(seconds))}
    speed["samples_per_second"] = {key: _figures(batch / value) for key, value in times.items()}
    if peak is not None:
        speed["utilisation"] = {key: round(flops / value / peak, 3) for key, value in times.items()}
    return speed


def _forward(report: Report, title: str, plain: Variant, ours: Variant, rounds: int) -> None:
    """Measures a forward pass with merged experts against the plain model's.

    They share the weights that it is merged into, whose values take no time; into a LLaVA's, whose pristine copy is too
    large for that, nothing is merged.
    """
    assert isinstance(ours, Step)
    if plain.is_clip:
        for adapter in ours.method.adapters:
            assert isinstance(adapter, AdaptedLinear)
            adapter.merge()
        batch = {"image": plain.batch["image"], "tokens": plain.prompts[plain.batch["label"]]}
    else:
        batch = {"batch": plain.batch}
    seconds = time_forward(plain.backbone, ours.backbone, batch, rounds, plain.device)
    speeds = {key: _figures(plain.arguments.batch / value) for key, value in medians(seconds).items()}
    merged = round(ratio(seconds, "merged", "plain"), 3)
    report.figures(f"{title}: forward", **{"merged/plain": merged}, samples_per_second=speeds)


def _model_flops(limit: Variant) -> int:
    """Returns the operations of forward and backward of the frozen model on its batch, counted on FLOP_SAMPLES."""
    batch = limit.make_batch(FLOP_SAMPLES)
    return limit.arguments.batch // FLOP_SAMPLES * count_flops(lambda: limit.loss(batch, end_to_end=False).backward())


def peak_flops(device: str) -> float | None:
    """Returns the card's dense bf16 peak in operations per second; None where it is not known."""
    return known_peak(torch.cuda.get_device_name()) if device == "cuda" else None


def known_peak(card: str) -> float | None:
    """Returns the dense bf16 peak of a card of that name; None: not known, as of the slower PCIe and NVL forms."""
    words = re.split(r"\W+", card.lower())
    if {"pcie", "nvl"} & set(words):
        return None
    return next((ACCELERATORS[word].bf16 for word in words if word in ACCELERATORS), None)


def _aims(arguments: argparse.Namespace, figures: dict[str, Any]) -> dict[str, str]:
    """Returns for each figure that has an aim whether it is met; a compiled step has the aim of an eager one."""
    aims = {**AIMS.get((arguments.model, arguments.batch), {}), **AIMS_OF_ALL}
    if "step/limit" in aims:
        aims["compiled/limit"] = aims["step/limit"]
    said = {}
    for key in aims.keys() & figures.keys():
        is_met = figures[key] >= aims[key] if key == "peft/step" else figures[key] <= aims[key]
        sign, word = ">=" if key == "peft/step" else "<=", "met" if is_met else "missed"
        said[f"aim {key}"] = f"{sign} {aims[key]}: {word}"
    return said


def _has_peft() -> bool:
    return find_spec("peft") is not None


def _rounded(ratios: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 3) for key, value in ratios.items()}


def _figures(value: float) -> float:
    return float(f"{value:.4g}")
