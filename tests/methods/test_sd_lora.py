"""SD-LoRA's update against the formula written out; which numbers train, and that tied magnitudes stay equal."""

from types import SimpleNamespace

import pytest
import torch

from r1p_dist.errors import InputError


def test_past_directions_are_frozen_and_normalised_and_all_magnitudes_train(stages_of) -> None:
    stages, train = stages_of("sd_lora", "options.magnitude=0.6", "options.rank=3")
    adapter, pairs = stages.method.adapters[0], []
    for task in range(3):
        stages.begin(task)
        assert adapter.magnitudes.tolist() == pytest.approx([0.6] * 20), "begin anew in every task"
        train(task)
        moved = (adapter.magnitudes - 0.6).abs() > 1e-4
        assert moved.tolist() == [number <= task for number in range(20)]
        delta = adapter.magnitudes[task] * adapter.B @ adapter.A
        for magnitude, (A, B) in zip(adapter.magnitudes[:task], pairs, strict=True):
            delta = delta + magnitude * (B @ A) / (B.square().sum().sqrt() * A.square().sum().sqrt())
        (factors,) = adapter.factors([adapter], torch.zeros(1, 1, 1), None)
        assert factors.scaling == 1
        torch.testing.assert_close(factors.B @ factors.A, delta, rtol=1e-4, atol=1e-6)
        pairs.append((adapter.A.detach().clone(), adapter.B.detach().clone()))
        stages.end()
        left = stages.updates[-1][adapter.name]
        torch.testing.assert_close(left.B @ left.A, delta.detach(), rtol=1e-4, atol=1e-6)
        assert stages.method.deployed(task + 1) == [task] and len(left.A) == 3 * (task + 1)
        stages.engine.close()


def test_shared_magnitudes_are_one_number_for_all_linears(stages_of) -> None:
    stages, train = stages_of("sd_lora", "options.shared=true", "train.weight_decay=0")
    for task in range(2):
        stages.begin(task)
        batch = stages.scan_batches(task, 1)[0]
        parameters = stages.method.trainable_parameters()
        tied = {name: value for name, value in parameters.items() if name.endswith("magnitudes")}
        if task:  # a common change of all, against the loss itself
            gradients = torch.autograd.grad(stages.method.loss(stages.method.backbone, batch)[0], tied.values())
            assert torch.stack(gradients)[:, 0].std() > 1e-6, "else nothing would need to be tied"
        train(task)
        values = torch.stack([value.detach() for value in tied.values()])
        assert (values == values[0]).all() and (values[0, : task + 1] != 0.8).all()
        stages.end()
        stages.engine.close()


def test_a_longer_stream_than_there_is_room_for_is_refused(stages_of) -> None:
    method = stages_of("sd_lora", "options.tasks=1")[0].method
    tasks = tuple(SimpleNamespace(name=name) for name in "ab")
    with pytest.raises(InputError, match="options.tasks=1: the stream has 2"):
        method.stages(SimpleNamespace(tasks=tasks))
