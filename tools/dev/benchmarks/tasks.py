"""What a task costs after many others: switching to it, its AGO loss, its merge, and what stays in memory.

A stream of tasks of one step each, as a run goes through it: fresh experts, a new DeepSpeed engine, a step, the merge.
For each number of finished tasks:

step         the time of a training step with the AGO loss over that of one without past tasks (interleaved, medians)
switch_s     seconds from the end of the last step of one task to the first of the next: merge, engine, fresh experts
stored_mb    the merged factors, 4 (in + out) numbers per adapted linear and task: all that is meant to grow
tensors_mb   by how much all live tensors of the process grew since the first task
resident_mb  by how much its anonymous memory did; the allocator's gaps are in it

The cost is linear in the number of tasks: the AGO loss reads the stored columns of B, the merge multiplies all factors.
"""

import argparse
import functools
import time
from typing import Any

import torch

from benchmarks.measure import anonymous_bytes, interleaved, live_tensor_bytes, processor, quiet, ratio
from benchmarks.models import CLASSES, random_images
from r1p_dist.backbones import load_backbone
from r1p_dist.engine import TaskEngine, start_process_group
from r1p_dist.methods import make_method
from r1p_dist.recipes import load_config


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns per number of finished tasks the ratio of step times, the seconds of a switch and the megabytes."""
    torch.set_num_threads(arguments.threads)
    start_process_group()
    with quiet():  # random weights are meant
        stream = Run(arguments)
    switch, stored, tensors, resident = {}, {}, {}, {}
    for task in range(1, max(arguments.tasks) + 1):
        stream.step()
        switch[task] = stream.switch(task)
        stored[task], tensors[task], resident[task] = stream.stored_bytes(), live_tensor_bytes(), anonymous_bytes()
    counts = sorted(arguments.tasks)
    seconds = interleaved({count: functools.partial(stream.step, count) for count in (0, *counts)}, arguments.pairs)
    return {
        "processor": processor(),
        "model": arguments.model,
        "batch": arguments.batch,
        "step": {count: round(ratio(seconds, count, 0), 3) for count in counts},
        "switch_s": {count: round(switch[count], 3) for count in counts},
        "stored_mb": {count: round(stored[count] / 1e6, 2) for count in counts},
        "tensors_mb": {count: round((tensors[count] - tensors[1]) / 1e6, 2) for count in counts},
        "resident_mb": {count: round((resident[count] - resident[1]) / 1e6, 2) for count in counts},
    }


class Run:
    """DAC on one rank, between two tasks or within one."""

    def __init__(self, arguments: argparse.Namespace):
        overrides = [f"backbone.name={arguments.model}", f"train.global_batch_size={arguments.batch}"]
        self.config = load_config("mini_mtil_dac", overrides)
        self.backbone = load_backbone(self.config.backbone)
        self.method = make_method(self.config, self.backbone)
        self.prepare = self.backbone.preparer([f"a photo of a {name}." for name in CLASSES])
        self.backbone.train()
        generator = torch.Generator().manual_seed(0)
        self.batch = {
            "image": random_images(self.backbone, arguments.batch, generator),
            "label": torch.randint(len(CLASSES), (arguments.batch,), generator=generator),
        }
        self.finished: list[dict] = []
        self._begin(0)

    def _begin(self, task: int) -> None:
        self.method.prepare(task)
        self.engine = TaskEngine(self.backbone, self.config, self.config.train, 1)

    def switch(self, task: int) -> float:
        """Ends the current task, begins the next and returns the seconds."""
        started = time.perf_counter()
        self.finished.append(self.method.updates())
        self.finished = list(self.method.set_merged(self.finished))
        self.engine.close()
        self._begin(task)
        return time.perf_counter() - started

    def step(self, past: int | None = None) -> None:
        """One training step; past: how many finished tasks the AGO loss sees, all by default."""
        if past is not None:
            for adapter in self.method.adapters:
                adapter.orthogonal_to = adapter.past_B[:, : past * adapter.merge_count] if past else None
        self.engine.step(self.method.loss(self.engine, self.prepare(self.batch))[0])
        self.method.after_step(None)

    def stored_bytes(self) -> int:
        adapters = self.method.adapters
        tensors = [adapter.past_B for adapter in adapters] + [past.A for a in adapters for past in a.merged]
        return sum(tensor.nbytes for tensor in tensors)
