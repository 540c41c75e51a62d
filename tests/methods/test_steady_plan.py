"""What the planner knows of Steady is what a second task on a small CLIP really takes, on one rank."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from r1p_dist.checkpoint import TensorFile, save_memory
from r1p_dist.kinds.open_clip.planner import Pictures, describe_clip
from r1p_dist.methods import make_method
from r1p_dist.planner.memory import checkpoint_bytes, moment_bytes
from r1p_dist.planner.model import ModelShape
from tests.small_clip import make_backbone
from tests.stages import Stages

LORA = ["options.rank=4", "options.alpha=4"]
WIDE = [*LORA, "options.batches=1", "options.sketch_above=40", "options.sketch=6"]
EITHER = pytest.mark.parametrize("outer_ridge", ["null", "0.1"])


def second_task(stages_of, name: str, *overrides: str) -> tuple[Stages, ModelShape]:
    """Returns the stages of a method in its second task, and what the planner knows of the second batch of it."""
    stages, train = stages_of(name, *overrides)
    stages.begin(0)
    train(0)
    stages.end()
    stages.begin(1)
    _, batch = stages.scan_batches(1, 2)
    size = Pictures(len(batch["image"]), *batch["tokens"].shape)
    return stages, describe_clip(stages.config, make_backbone().to("meta"), size, torch.float32)


def flops_of(action: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


@EITHER
def test_what_is_known_of_past_tasks_has_the_planned_shapes(stages_of, outer_ridge: str) -> None:
    stages, shape = second_task(stages_of, "steady", *WIDE, f"options.outer_ridge={outer_ridge}")
    planned = make_method(stages.config, make_backbone().to("meta"))
    planned.plan_past()
    real = {}
    for adapter, other in zip(stages.method.adapters, planned.adapters, strict=True):
        for matrix, blank in ((adapter.whitening, other.whitening), (adapter.outer, other.outer)):
            assert (matrix is None) == (blank is None)
            if matrix is not None:
                real[matrix.matrix.data_ptr()] = matrix.matrix
                assert matrix.matrix.shape == blank.matrix.shape
    assert (adapter.outer is None) == (outer_ridge == "null")
    assert shape.known_bytes == sum(matrix.nbytes for matrix in real.values())
    stages.engine.close()


@EITHER
def test_what_a_task_leaves_has_the_planned_size(stages_of, tmp_path: Path, outer_ridge: str) -> None:
    stages, shape = second_task(stages_of, "steady", *WIDE, f"options.outer_ridge={outer_ridge}")
    file = tmp_path / "memory.safetensors"
    save_memory(file, stages.memory[0])
    left = {name: numel for read in shape.boundary.inputs for name, numel in read.left.items()}
    assert left == {name: tensor.numel() for name, tensor in TensorFile(file).items()}
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    updates = 4 * sum(numel for update in stages.updates[0].values() for numel in (update.A.numel(), update.B.numel()))
    assert checkpoint_bytes(shape)["task"] == file.stat().st_size - header + updates
    stages.engine.close()


@EITHER
def test_a_step_of_a_later_task_takes_the_planned_operations(stages_of, outer_ridge: str) -> None:
    """Beside a plain LoRA's, as the planner counts no loss."""
    found = []
    for name, own in (("steady", [*WIDE, f"options.outer_ridge={outer_ridge}"]), ("lora", LORA)):
        stages, shape = second_task(stages_of, name, *own)
        method, batch = stages.method, stages.scan_batches(1, 2)[1]
        real = flops_of(lambda method=method, batch=batch: method.loss(method.backbone, batch)[0].backward())
        found.append((real, shape.trace.forward_flops + shape.trace.backward_flops))
        stages.engine.close()
    (real, planned), (real_lora, planned_lora) = found
    assert real - real_lora == planned - planned_lora > 0


class Nothing:
    """A watcher that looks at nothing of what the moments need."""

    needs = "sensitivity"

    @contextmanager
    def watch(self):
        yield

    def saw(self, gradients: None) -> None:
        pass


@EITHER
def test_the_moments_of_a_scanned_batch_take_the_planned_operations_and_memory(stages_of, outer_ridge: str) -> None:
    stages, shape = second_task(stages_of, "steady", *WIDE, f"options.outer_ridge={outer_ridge}")
    method, trainer = stages.method, stages.trainer
    watcher = method._watcher()
    of_second = []  # batch, without what is made of the sums at the end
    for each in (method._watcher, Nothing):
        one, two = (flops_of(lambda n=n, each=each: trainer.scan(each(), batches=n, trained=True)) for n in (1, 2))
        of_second.append(two - one)
    assert watcher.needs == shape.boundary.needs
    assert of_second[0] - of_second[1] == shape.moment_flops > 0
    trainer.scan(watcher, batches=1, trained=True)
    sums = [*watcher._of_inputs._sums.values(), *watcher._of_gradients._sums.values()]
    sizes = [value.nbytes for value in sums]
    assert moment_bytes(shape, 1) == sum(sizes) + 2 * max(sizes)
    stages.engine.close()
