"""CoDyRA's thresholds against the released code's schedule; what survives them is merged (arXiv 2412.01004)."""

from types import SimpleNamespace

import numpy
import pytest
import torch

from r1p_dist.fit import train_step


def test_half_is_dense_and_then_a_level_lasts_five_steps_of_five_hundred(stages_of) -> None:
    method = stages_of("codyra", "options.threshold=0.005")[0].method
    method.begin(SimpleNamespace(iterations=500), None)
    levels = numpy.linspace(0, 0.005, 50)
    expected = [0.0] * 250 + [levels[step // 5] for step in range(250)]
    assert [method.threshold(step) for step in range(500)] == pytest.approx(expected)
    method.begin(SimpleNamespace(iterations=20), None)  # the same shares, with gaps between levels
    found = [method.threshold(step) for step in range(20)]
    assert found[:10] == [0.0] * 10 and found == sorted(found) and found[-1] >= 0.9 * 0.005


def test_no_gate_closes_in_the_dense_half_and_what_is_left_is_merged(stages_of) -> None:
    sizes = ["train.iterations=6", "options.rank=6", "options.threshold=0.8", "options.levels=3"]
    stages, _ = stages_of("codyra", *sizes)
    method, pristine = stages.method, [a.linear.weight.detach().clone() for a in stages.method.adapters]
    trainer = stages.begin(0)
    closed, gates = [], torch.cat([adapter.gate.detach() for adapter in method.adapters])
    for step, batch in enumerate(stages.scan_batches(0, 6)):
        train_step(method, trainer, [batch], stages.config.train)
        trainer.step_number = step + 1
        closed.append(int(sum((adapter.gate == 0).sum() for adapter in method.adapters)))
    assert closed[:4] == [0] * 4  # the first level is 0
    # then 0.4 and 0.8 are taken away, and a step of Adam changes a gate by 0.01 at most
    assert abs(closed[4] - int((gates.abs() < 0.4).sum())) <= 0.2 * closed[4] + 2
    assert abs(closed[5] - int((gates.abs() < 1.2).sum())) <= 0.2 * closed[5] + 2
    assert 0 < closed[4] < closed[5] < len(gates)
    wholes = [adapter.B @ torch.diag(adapter.gate) @ adapter.A for adapter in method.adapters]
    left = [int((adapter.gate != 0).sum()) for adapter in method.adapters]
    stages.end()
    for adapter, weight, whole, count in zip(method.adapters, pristine, wholes, left, strict=True):
        assert len(stages.updates[0][adapter.name].A) == max(1, count)
        torch.testing.assert_close(adapter.linear.weight[adapter.rows], weight[adapter.rows] + whole.detach())
    stages.engine.close()
