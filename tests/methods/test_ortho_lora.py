"""Ortho-LoRA's projection against the rule written out (arXiv 2601.09684, after PCGrad)."""

import importlib
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from r1p_dist.methods.ortho_lora import project
from r1p_dist.protocol import DataRequest
from tests.data.test_peers import folder_of_peers
from tests.methods.test_conformance import Loader


def by_hand(gradients: list[torch.Tensor], orders: list[list[int]]) -> torch.Tensor:
    found = []
    for number, order in enumerate(orders):
        own = gradients[number]
        for other in order:
            if other == number:
                continue
            overlap = float((own * gradients[other]).sum())
            if overlap < 0:
                own = own - overlap / float((gradients[other] ** 2).sum()) * gradients[other]
        found.append(own)
    return sum(found) / len(found)


def test_conflicts_are_projected_away_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(2, 3, generator=generator) for _ in range(3)]
    gradients[1] -= 2 * gradients[0]
    assert any((a * b).sum() < 0 for a, b in itertools.combinations(gradients, 2))
    drawn = torch.Generator().manual_seed(5)
    orders = [torch.randperm(3, generator=drawn).tolist() for _ in range(3)]
    found = project(gradients, torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, by_hand(gradients, orders))
    alike = [gradients[0], 2 * gradients[0], 3 * gradients[0]]
    torch.testing.assert_close(project(alike, torch.Generator()), 2 * gradients[0])


def test_a_matrix_gets_what_torchjds_pcgrad_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder_of_peers("peers"))])
    pcgrad = importlib.import_module("torchjd.aggregation").PCGrad()
    generator = torch.Generator().manual_seed(1)
    for number in range(5):
        gradients = torch.randn(4, 2, 3, generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(number)  # which draws its orders
            expected = pcgrad(gradients.flatten(1)) / 4  # it sums
        found = project(gradients, torch.Generator().manual_seed(number))
        torch.testing.assert_close(found.flatten(), expected, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found, gradients.mean(0), atol=1e-2)


def test_the_projected_gradient_conflicts_with_no_task_of_two() -> None:
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    found = project([first, second], torch.Generator())
    assert (found @ first) >= 0 and (found @ second) >= 0


def test_task_by_task_a_step_has_a_batch_of_every_past_task(stages_of) -> None:
    stages, _ = stages_of("ortho_lora", "options.together=false", "options.kept=3")
    method, tasks = stages.method, tuple(SimpleNamespace(name=name) for name in ("a", "b"))
    method.stages(SimpleNamespace(tasks=tasks))
    assert method.further_data(SimpleNamespace(tasks=tasks[1:]), tasks[:1]) == {
        "a": DataRequest(tasks[:1], 3),
        "b": DataRequest(tasks[1:]),
    }

    trainer = stages.begin(0, tasks[:1])
    trainer.add_stream("a", Loader(0, 1, 1))
    method.step(trainer, ())
    stages.end()
    stages.engine.close()
    assert len(stages.updates) == 1, "merged, and begun anew"

    trainer = stages.begin(1, tasks[1:])
    trainer.add_stream("a", Loader(0, 1, 1))
    trainer.add_stream("b", Loader(1, 1, 1))
    parameters = method.trainable_parameters()
    generator = torch.Generator().manual_seed(0)
    for adapter in method.adapters:  # else A has no gradient yet
        torch.nn.init.normal_(adapter.B, generator=generator)
    expected = {}
    by_task = [
        torch.autograd.grad(method.backbone.loss(method.backbone, batch), list(parameters.values()))
        for batch in (stages.scan_batches(task, 1)[0] for task in (0, 1))
    ]
    order = method.generator(trainer.step_number)
    for name, of_tasks in zip(parameters, zip(*by_task, strict=True), strict=True):
        orders = [torch.randperm(2, generator=order).tolist() for _ in range(2)]
        expected[name] = by_hand(list(of_tasks), orders)
    given: dict[str, torch.Tensor] = {}
    trainer.backward_gradients, trainer.update = given.update, lambda: None
    method.step(trainer, ())
    stages.engine.close()
    torch.testing.assert_close(given, expected)
    # of two tasks no matrix is left with a step against one of them, their own gradients being the other side
    own = [dict(zip(parameters, gradients, strict=True)) for gradients in by_task]
    before = {name: float((own[0][name] * own[1][name]).sum()) for name in parameters}
    for kind in "AB":
        assert any(overlap < 0 for name, overlap in before.items() if name.endswith(f".{kind}"))
    assert any(overlap > 0 for overlap in before.values()), "each matrix by itself: some do not conflict"
    for name, gradient in given.items():
        sizes = [float(gradients[name].norm() * gradient.norm()) for gradients in own]
        left = [float((gradients[name] * gradient).sum()) for gradients in own]
        assert all(inner >= -1e-5 * size for inner, size in zip(left, sizes, strict=True)), name
