"""The time, floating point operations and memory of one training step, against the frozen model and PEFT's LoRA.

limit  the frozen model without adapters, gradient flowing to the input of the first block of each tower; with this
       project's attention, which is faster than open_clip's nn.MultiheadAttention
step   the same model with a pool of experts on q, k, v, out, fc1 and fc2: votes, forward, backward, AdamW
steady the same model under the method of that name, which knows inputs of past tasks
peft   open_clip's blocks with PEFT's LoRA of the same rank, alpha and dropout on the same linears (q, k and v as
       linears of their own, as Hugging Face's CLIP has them): forward, backward, AdamW

`same_work`: all encode one untrimmed prompt per sample. `end_to_end`: `step` encodes each distinct prompt once, trimmed
to the longest, as it does in training; the others stay as they are. `median_s` has the times of both, those of the
second with that suffix; a ratio is the median of the rounds' ratios. Memory is, on the CPU, the highest
anonymous memory over two steps in a fresh process, less what the process had before the model was built; on a card,
what stays between two steps and what a step takes beside it, at its highest. A LLaVA has no `end_to_end` of its own:
its conversations differ.
"""

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    addmm_flop,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop,
    sdpa_flop,
)

from benchmarks.measure import (
    PeakMemory,
    anonymous_bytes,
    in_fresh_process,
    interleaved,
    medians,
    peak_of_call,
    processor,
    ratio,
    stored_bytes,
)
from benchmarks.models import LLAVAS
from benchmarks.variants import VARIANTS, Variant, make_variants
from r1p_dist.errors import InputError


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the results of one run of the benchmark, as its JSON file holds them."""
    names = ["step", *arguments.against.split(",")]
    for name in names:
        if name not in VARIANTS:
            raise InputError(
                f"--against {arguments.against}: no variant {name!r}; there are limit, compiled, steady and peft"
            )
    torch.set_num_threads(arguments.threads)
    variants = make_variants(names, arguments)
    if arguments.checkpointing:
        for variant in variants.values():
            variant.checkpoint_blocks()
    result: dict[str, Any] = {
        "processor": processor(),
        "model": arguments.model,
        "batch": arguments.batch,
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "dropout": arguments.dropout,
        "dropout_kind": arguments.dropout_kind,
    }
    for work in ("same_work",) if arguments.model in LLAVAS else ("same_work", "end_to_end"):
        steps = steps_of(variants, work)
        seconds = interleaved(steps, arguments.pairs, torch.device(arguments.device))
        ratios = time_ratios(seconds)
        if "limit" in names:
            flops = {name: count_flops(steps[name]) for name in ("step", "limit")}
            memory = {name: peak_memory(arguments, variants[name], name, work) for name in flops}
            ratios["flops step/limit"] = flops["step"] / flops["limit"]
            ratios["memory step/limit"] = memory["step"] / memory["limit"]
            result.setdefault("memory_mb", {})[work] = {name: round(value / 1e6) for name, value in memory.items()}
        result[work] = {name: round(value, 3) for name, value in ratios.items()}
        suffix = " end_to_end" if work == "end_to_end" else ""
        for name, value in medians(seconds).items():
            result.setdefault("median_s", {})[name + suffix] = round(value, 4)
    return result


def steps_of(variants: Mapping[str, Variant], work: str) -> dict[str, Callable[[], None]]:
    """Returns what runs one step of each variant; work: same_work or end_to_end."""
    return {name: functools.partial(variant.step, work == "end_to_end") for name, variant in variants.items()}


def time_ratios(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Returns the ratios of times that the variants at hand allow."""
    pairs = [("step", "limit"), ("compiled", "limit"), ("steady", "step"), ("peft", "step")]
    return {f"{a}/{b}": ratio(seconds, a, b) for a, b in pairs if a in seconds and b in seconds}


# what torch's counter does not know
for operation, formula in (
    (torch.ops.aten.addmm_, addmm_flop),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flop),
):
    if operation not in flop_registry:
        register_flop_formula(operation, get_raw=True)(formula)


def count_flops(step: Callable[[], Any]) -> int:
    """Returns the floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_memory(arguments: argparse.Namespace, variant: Variant, name: str, work: str) -> int:
    """Returns the bytes that a variant needs at its highest, as the head of this file says."""
    end_to_end = work == "end_to_end"
    if arguments.device == "cpu":
        return in_fresh_process(_peak_of_process, arguments, name, end_to_end)
    step = functools.partial(variant.step, end_to_end)
    return stored_bytes(variant.tensors()) + peak_of_call(step, variant.device)


def _peak_of_process(arguments: argparse.Namespace, name: str, end_to_end: bool) -> int:
    torch.set_num_threads(arguments.threads)
    before = anonymous_bytes()
    variant = VARIANTS[name](arguments)
    if arguments.checkpointing:
        variant.checkpoint_blocks()
    with PeakMemory() as peak:
        for _ in range(2):
            variant.step(end_to_end)
    return peak.bytes - before
