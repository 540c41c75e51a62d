"""N-LoRA's penalty against the formula written out, and how seldom its tasks change the same weights."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import r1p_dist.methods.n_lora as n_lora
from r1p_dist.adapters import Factors, LoRALinear
from r1p_dist.errors import InputError
from r1p_dist.methods.n_lora import SparseLinear
from r1p_dist.methods.o_lora import OrthogonalLinear


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_the_penalty_is_the_sum_of_absolute_values_of_the_update(chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(n_lora, "_CHUNK_ELEMENTS", chunk)
    adapter = SparseLinear(nn.Linear(6, 5), rank=2)
    adapter.weight_of_penalty = 0.25
    A, B = torch.randn(2, 6, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    expected = 0.25 * sum(abs(sum(B[i, k] * A[k, j] for k in range(2))) for i in range(5) for j in range(6))
    ours = adapter.penalty(Factors(A, B, 0.5))["sparse"]
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, (A, B)), torch.autograd.grad(expected, (A, B)))


def test_the_codes_norm_is_of_the_small_product_and_needs_square_layers(stages_of) -> None:
    adapter = SparseLinear(nn.Linear(6, 6), rank=2)
    adapter.weight_of_penalty, adapter.of_code = 2.0, True
    A, B = torch.randn(2, 6), torch.randn(6, 2)
    expected = 2 * sum(abs(sum(A[k, i] * B[i, j] for i in range(6))) for k in range(2) for j in range(2))
    torch.testing.assert_close(adapter.penalty(Factors(A, B, 1.0))["sparse"], expected)
    with pytest.raises(InputError, match="options.norm=code: image.0.fc1 is 128 by 32"):
        stages_of("n_lora", "options.norm=code")
    assert stages_of("n_lora", "options.norm=code", "targets.layers=[q,k,v,out]")


def learn(adapter: LoRALinear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Fits y by the adapter's update alone, with its penalty; returns the update."""
    optimizer = torch.optim.Adam([adapter.A, adapter.B], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=80)
    for _ in range(80):
        loss = (x @ (adapter.B @ adapter.A).T - y).square().mean()
        loss = loss + sum(adapter.penalty(Factors(adapter.A, adapter.B, 1.0)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (adapter.B @ adapter.A).detach()


def collisions(make: Callable[[list[torch.Tensor]], LoRALinear]) -> float:
    """The share of weights that both of two tasks change by more than 0.02; a task needs two inputs alone."""
    updates, rows = [], []
    for task in range(2):
        generator = torch.Generator().manual_seed(task)
        x = torch.randn(10, 12, generator=generator)
        needed = torch.zeros(10, 12)
        needed[:, 5 * task : 5 * task + 2] = 1.0
        adapter = make(rows)
        adapter.reset(generator)
        updates.append(learn(adapter, x, x @ needed.T))
        rows.append(adapter.A.detach())
        assert (x @ updates[-1].T - x @ needed.T).norm() < 0.35 * (x @ needed.T).norm(), "it learns its task"
    return float(((updates[0].abs() > 0.02) & (updates[1].abs() > 0.02)).float().mean())


def test_tasks_collide_less_than_with_o_lora() -> None:
    def sparse(rows: list[torch.Tensor]) -> SparseLinear:
        adapter = SparseLinear(nn.Linear(12, 10), rank=2)
        adapter.weight_of_penalty = 0.01
        return adapter

    def orthogonal(rows: list[torch.Tensor]) -> OrthogonalLinear:
        adapter = OrthogonalLinear(nn.Linear(12, 10), rank=2)
        adapter.past_A, adapter.weight_of_penalty = (torch.cat(rows) if rows else None), 0.5
        return adapter

    ours, theirs = collisions(sparse), collisions(orthogonal)
    assert ours < 0.25 * theirs, (ours, theirs)
