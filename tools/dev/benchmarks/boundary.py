"""What a method does between two tasks, in steps: what it measures of one, and what it makes of it for the next.

A run of three tasks of a recipe's stream; of its last task, in times of one of its steps:

end        the method's own end: a pass over some data, what it keeps of it
begin      its own begin, with what so many past tasks left, that of the first task as often

tensors_mb is by how much all live tensors are more after a begin than with one past task, memory_mb what a task leaves
on the disk for later ones. Merge, engine and evaluation, which all methods have, are left out.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import r1p_dist.train
from benchmarks.measure import live_tensor_bytes, processor
from r1p_dist.backbones import Backbone
from r1p_dist.config import RunConfig
from r1p_dist.data import Stream
from r1p_dist.protocol import Method, Stage
from r1p_dist.recipes import load_config
from r1p_dist.trainer import TaskTrainer

_TASKS = 3


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the times by what was done, and by the number of past tasks, and the megabytes."""
    torch.set_num_threads(arguments.threads)
    given = load_config(arguments.recipe, arguments.overrides)
    names = [task.name for task in Stream.load(given.stream, given.order).tasks[:_TASKS]]
    with tempfile.TemporaryDirectory() as folder:
        own = [f"tasks=[{','.join(names)}]", f"run_dir={folder}/run", "deepspeed.config=zero0"]
        config = load_config(arguments.recipe, [*arguments.overrides, *own])
        watch = _Watch(arguments.tasks)
        with mock.patch.multiple(r1p_dist.train, make_method=watch.method, fit=watch.fit):
            r1p_dist.train.run(config)
        left = sum(file.stat().st_size for file in Path(folder).glob(f"run/adapters/*-{names[0]}/memory.safetensors"))
    step = watch.steps / watch.iterations
    return {
        "processor": processor(),
        "model": config.backbone.name,
        "method": config.method,
        "batch": config.train.global_batch_size,
        "end": round(watch.end / step, 2),
        "begin": {count: round(seconds / step, 2) for count, seconds in watch.begin.items()},
        "tensors_mb": {count: round((size - watch.size[1]) / 1e6, 2) for count, size in watch.size.items()},
        "memory_mb": round(left / 1e6, 2),
    }


class _Watch:
    """Seconds of what a run does; those of its last stage are left at the end."""

    def __init__(self, counts: list[int]) -> None:
        self._counts = sorted({1, *counts})
        self.steps, self.iterations, self.end = 0.0, 1, 0.0
        self.begin, self.size = dict[int, float](), dict[int, int]()

    def method(self, config: RunConfig, backbone: Backbone) -> Method:
        """Takes the place of `make_method`."""
        made = self._make(config, backbone)
        begin, end = made.begin, made.end

        def timed_begin(stage: Stage, trainer: TaskTrainer) -> None:
            past = trainer.past_memory()
            if len(past) == _TASKS - 1:
                for count in self._counts:
                    with mock.patch.object(trainer, "past_memory", lambda count=count: [past[0]] * count):
                        started = time.perf_counter()
                        begin(stage, trainer)
                        self.begin[count] = time.perf_counter() - started
                    self.size[count] = live_tensor_bytes()
            begin(stage, trainer)

        def timed_end(stage: Stage, trainer: TaskTrainer) -> None:
            started = time.perf_counter()
            end(stage, trainer)
            self.end = time.perf_counter() - started

        vars(made).update(begin=timed_begin, end=timed_end)
        return made

    def fit(self, running: Any, *rest: Any) -> None:
        """Takes the place of `fit`."""
        started = time.perf_counter()
        self._fit(running, *rest)
        self.steps, self.iterations = time.perf_counter() - started, running.stage.iterations

    _make, _fit = staticmethod(r1p_dist.train.make_method), staticmethod(r1p_dist.train.fit)
