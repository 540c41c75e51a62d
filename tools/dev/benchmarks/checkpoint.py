"""What a save costs the training: a step during which a checkpoint is taken and written, over a step without.

*take* is the time for which the training stands still: one reduction to rank 0 and a copy of what is not reduced. The
writing, hashing and syncing go on in the background during the step. One rank; every save is on the disk before the
next is timed, as it is in training, where many steps lie between two. bytes_per_number: of the file with the trainable
numbers and their moments.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import interleaved, medians, processor, quiet, ratio
from benchmarks.tasks import Run
from r1p_dist.checkpoint import Capture, Checkpoints
from r1p_dist.engine import start_process_group


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the ratio of step times, the share of a step that the training stands still, and bytes per number."""
    torch.set_num_threads(arguments.threads)
    start_process_group()
    with quiet():  # random weights are meant
        training = Run(arguments)
    parameters = training.method.trainable_parameters()
    numbers = sum(parameter.numel() for parameter in parameters.values())
    taken: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(training.config.model_copy(update={"run_dir": Path(folder)}))

        def step_with_save() -> None:
            started = time.perf_counter()
            capture = Capture(parameters, training.engine.engine, torch.get_rng_state())
            checkpoints.save("00-task/step-1", {"stage": 0, "step": 1}, training.method.state(), capture, links={})
            taken.append(time.perf_counter() - started)
            training.step()

        variants = {"plain": training.step, "save": step_with_save, "wait": checkpoints.wait}
        seconds = interleaved(variants, arguments.pairs)
        size = (Path(folder) / "checkpoints/00-task/step-1/training.safetensors").stat().st_size
    step = medians(seconds)["plain"]
    return {
        "processor": processor(),
        "model": arguments.model,
        "batch": arguments.batch,
        "step with a save / step": round(ratio(seconds, "save", "plain"), 3),
        "take / step": round(sorted(taken)[len(taken) // 2] / step, 4),
        "bytes_per_number": round(size / numbers, 2),
    }
