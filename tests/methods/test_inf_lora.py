"""InfLoRA's design of A and the growth of its basis (arXiv 2404.00228, DualGPM), against forms written here."""

from types import SimpleNamespace

import pytest
import torch

from r1p_dist.methods import inf_lora
from r1p_dist.methods.inf_lora import Basis, free_part, grow, leading


def moment_of(*directions: tuple[int, float], size: int = 6) -> torch.Tensor:
    """A second moment with so much energy along axes."""
    moment = torch.zeros(size, size)
    for axis, energy in directions:
        moment[axis, axis] = energy
    return moment


def axes(basis: Basis) -> list[int]:
    projector = basis.columns @ basis.columns.T
    torch.testing.assert_close(projector, torch.diag(projector.diagonal().round()), atol=1e-5, rtol=0)
    return projector.diagonal().round().nonzero().flatten().tolist()


def test_a_misses_what_the_basis_holds() -> None:
    moment = moment_of((0, 9.0), (1, 4.0), (2, 1.0))
    assert leading(moment, 1)[:, 0].abs().argmax() == 0
    held = Basis(torch.eye(6)[:, :1])
    assert leading(free_part(moment, held), 1)[:, 0].abs().argmax() == 1
    free = Basis(torch.eye(6)[:, 2:], is_free=True)
    assert leading(free_part(moment, free), 1)[:, 0].abs().argmax() == 2


def test_the_basis_grows_until_it_holds_the_share_of_squared_energy() -> None:
    # squared energies 9, 4, 1 of 14: the first two hold 0.93
    moment = moment_of((0, 3.0), (1, 2.0), (2, 1.0))
    assert axes(grow(moment, None, 0.9)) == [0]  # as many as stay below the share
    assert axes(grow(moment, None, 0.95)) == [0, 1]
    held = Basis(torch.eye(6)[:, [0]])
    assert axes(grow(moment, held, 0.9)) == [0, 1]
    assert axes(grow(moment, held, 0.5)) == [0]


def test_behind_half_of_all_directions_the_free_ones_are_kept() -> None:
    moment = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.01]))
    basis = grow(moment, None, 0.99)  # squared energies 25, 16, 9, 4 of 55 hold 0.98
    assert basis.is_free and axes(basis) == [4, 5]
    shrunk = grow(moment_of((4, 3.0), (0, 0.1)), Basis(torch.eye(6)[:, 4:], is_free=True), 0.9)
    assert shrunk.is_free and axes(shrunk) == [5]


def test_the_designed_a_is_frozen_orthonormal_by_a_third_and_shared_by_q_k_and_v(stages_of) -> None:
    stages, train = stages_of("inf_lora", "options.batches=2", "options.rank=3")
    stages.begin(0)
    by_name = {adapter.name: adapter for adapter in stages.method.adapters}
    q, k, v = (by_name[f"image.0.{layer}"] for layer in "qkv")
    torch.testing.assert_close(3 * q.A @ q.A.T, torch.eye(3), atol=1e-5, rtol=0)
    assert torch.equal(q.A, k.A) and torch.equal(q.A, v.A) and not q.A.requires_grad
    before = q.A.clone()
    train(0)
    assert torch.equal(before, q.A) and q.B.abs().sum() > 0
    # the inputs of the image tower's first attention, by a second way: its LayerNorm's output
    seen = []
    backbone = stages.method.backbone
    norm = backbone.model.visual.transformer.resblocks[0].ln_1
    handle = norm.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    with torch.no_grad():
        backbone.eval()
        for batch in stages.scan_batches(0, 2):
            backbone(image=batch["image"])
    handle.remove()
    x = torch.cat(seen).flatten(0, 1)
    top = torch.linalg.svd(x.T @ x)[0][:, :3]
    torch.testing.assert_close((3 * before.T @ before), top @ top.T, atol=1e-3, rtol=0)
    stages.engine.close()


def test_a_later_tasks_update_leaves_alone_what_past_inputs_span(stages_of, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["options.first_threshold=0.9", "options.last_threshold=0.96", "options.rank=3", "train.lr=0.1"]
    stages, train = stages_of("inf_lora", *options)
    method, tasks = stages.method, tuple(SimpleNamespace(name=name) for name in "abc")
    method.stages(SimpleNamespace(tasks=tasks))
    thresholds: list[float] = []

    def noted(moment: torch.Tensor, basis: Basis | None, threshold: float) -> Basis:
        thresholds.append(threshold)
        return grow(moment, basis, threshold)

    monkeypatch.setattr(inf_lora, "grow", noted)
    by_name = {adapter.name: adapter for adapter in method.adapters}
    for task in range(3):
        stages.begin(task, tasks[task : task + 1])
        train(task)
        for layer in {name.rpartition(".")[0] for name in stages.memory[-1]} if task else ():
            columns, is_free = (stages.memory[-1][f"{layer}.{part}"] for part in ("basis", "free"))
            held = columns @ columns.T
            if is_free:
                held = torch.eye(len(held)) - held
            assert 1 <= held.trace().round() < len(held)
            change = (by_name[layer].B @ by_name[layer].A).detach()
            assert change.norm() > 1e-3 and (change @ held).norm() < 1e-4 * change.norm(), layer
        stages.end()
        stages.engine.close()
    # it grows with the number of the task, as the released code's does
    layers = len(thresholds) // 3
    assert thresholds == pytest.approx(layers * [0.9] + layers * [0.92] + layers * [0.94])
