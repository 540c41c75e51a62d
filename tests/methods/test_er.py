"""Experience replay's loss: that of the new batch plus a weight times that of a batch of past tasks."""

from types import SimpleNamespace

import pytest
import torch

from r1p_dist.protocol import DataRequest
from tests.methods.test_conformance import Loader


def test_a_step_learns_from_a_past_batch_too(stages_of) -> None:
    stages, train = stages_of("er", "options.weight=0.25")
    stages.begin(0)
    assert set(train(0)) == {"loss"}
    stages.end()
    stages.engine.close()

    method, backbone = stages.method, stages.method.backbone
    before = method.adapters[0].B.detach().clone()
    assert before.any()
    trainer = stages.begin(1)
    assert torch.equal(method.adapters[0].B, before) and not method.adapters[0].merged, "one LoRA is kept going"
    trainer.add_stream("replay", Loader(0, 2, 1))
    new, old = stages.scan_batches(1, 1)[0], stages.scan_batches(0, 1)[0]
    parameters = list(method.trainable_parameters().values())
    expected = backbone.loss(backbone, new) + 0.25 * backbone.loss(backbone, old)
    theirs = torch.autograd.grad(expected, parameters)
    method._replayed = iter(trainer.next_batches("replay"))
    loss, terms = method.loss(backbone, new)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(terms["replay"], expected.detach() - terms["data"], rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), theirs)
    stages.engine.close()


def test_every_step_takes_its_own_past_batch(stages_of) -> None:
    stages, train = stages_of("er")
    stages.begin(0)
    train(0)
    stages.end()
    stages.engine.close()
    trainer = stages.begin(1)
    trainer.add_stream("replay", Loader(0, 2, 1))
    assert set(train(1)) == {"loss", "loss_data", "loss_replay"}
    with pytest.raises(StopIteration):  # two steps took two
        trainer.next_batches("replay")
    stages.engine.close()


def test_it_asks_for_all_past_tasks_and_as_many_samples_as_are_kept(stages_of) -> None:
    method = stages_of("er", "options.kept=3")[0].method
    tasks = (SimpleNamespace(name="a"), SimpleNamespace(name="b"))
    assert method.further_data(None, ()) == {}
    assert method.further_data(None, tasks) == {"replay": DataRequest(tasks, 3)}
