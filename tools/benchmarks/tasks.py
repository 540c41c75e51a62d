"""What a task costs after many others: the step with its AGO loss, the merge, and what stays in memory.

For each number of past tasks: the time of a training step over that of a step without past tasks (`step`, medians of
interleaved rounds), the seconds to merge one more task into all weights (`merge_s`), and the bytes of all merged
factors (`stored_mb`), which is all that grows. The cost is linear in the number of tasks: 4 (in + out) numbers per
adapted linear and task are stored, the AGO loss reads 4 out of them in each step, the merge multiplies all of them.
"""

import argparse
import functools
import time
from typing import Any

import torch

from benchmarks.measure import interleaved, processor, ratio
from benchmarks.step import Step
from r1p_dist.adapters import AdaptedLinear, Factors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="tiny or an open_clip name (random weights)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 50])
    parser.set_defaults(dtype="float32", dropout=0.0, dropout_kind="element")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns per number of past tasks the ratio of step times, the merge's seconds and the stored megabytes."""
    torch.set_num_threads(arguments.threads)
    variant = PoolWithPast(arguments)
    steps = {count: functools.partial(variant.step_after, count) for count in (0, *arguments.tasks)}
    merges, stored = {}, {}
    for task in range(max(arguments.tasks)):
        merges[task + 1] = variant.merge_random_task(task)
        stored[task + 1] = variant.stored_bytes()
    seconds = interleaved(steps, arguments.pairs)
    return {
        "processor": processor(),
        "model": arguments.model,
        "batch": arguments.batch,
        "step": {count: round(ratio(seconds, count, 0), 3) for count in arguments.tasks},
        "merge_s": {count: round(merges[count], 3) for count in arguments.tasks},
        "stored_mb": {count: round(stored[count] / 1e6, 2) for count in arguments.tasks},
    }


class PoolWithPast(Step):
    """A pool under training, with the factors of past tasks to stay orthogonal to."""

    def prepare(self, arguments: argparse.Namespace) -> None:
        super().prepare(arguments)
        self.adapters = [module for module in self.backbone.modules() if isinstance(module, AdaptedLinear)]

    def merge_random_task(self, seed: int) -> float:
        """Merges a task of random experts into every weight and returns the seconds."""
        generator = torch.Generator().manual_seed(seed)
        updates = [
            Factors(
                torch.randn(adapter.merge_count, adapter.in_features, generator=generator),
                torch.randn(adapter.out_features, adapter.merge_count, generator=generator) * 1e-4,
                adapter.scaling,
            )
            for adapter in self.adapters
        ]
        started = time.perf_counter()
        for adapter, update in zip(self.adapters, updates, strict=True):
            adapter.merge_update(update)
        return time.perf_counter() - started

    def stored_bytes(self) -> int:
        tensors = [adapter.past_B for adapter in self.adapters]
        tensors += [past.A for adapter in self.adapters for past in adapter.merged]
        return sum(tensor.nbytes for tensor in tensors)

    def step_after(self, count: int) -> None:
        """One training step with the AGO loss of `count` past tasks."""
        for adapter in self.adapters:
            adapter.orthogonal_to = adapter.past_B[:, : count * adapter.merge_count] if count else None
        self.step(end_to_end=True)

    def loss(self, end_to_end: bool) -> torch.Tensor:
        loss = super().loss(end_to_end)
        terms = [adapter.ago for adapter in self.adapters if adapter.ago is not None]
        for adapter in self.adapters:
            adapter.ago = None
        return loss + 0.1 * torch.stack(terms).mean() if terms else loss
