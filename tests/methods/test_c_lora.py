"""C-LoRA's gradients and its orthogonal loss against the formulae written out (arXiv 2502.17920)."""

import torch
from torch import nn

from r1p_dist.methods.c_lora import RoutedLinear, leading_columns


def test_the_value_is_of_all_routing_and_gradients_come_through_the_new_part_alone() -> None:
    torch.manual_seed(0)
    adapter = RoutedLinear(nn.Linear(6, 5), rank=3, spread=0.1, rows=None)
    adapter.draw_routing(torch.Generator().manual_seed(1))
    adapter.old = torch.randn(3, 3)
    x, g = torch.randn(2, 4, 6), torch.randn(2, 4, 5)
    adapter(x).backward(g)
    A, B, R = (value.detach() for value in (adapter.A, adapter.B, adapter.R))
    whole = x @ (adapter.linear.weight + B @ (adapter.old + R) @ A).T + adapter.linear.bias
    torch.testing.assert_close(adapter(x), whole)
    G = torch.einsum("bto,bti->oi", g, x)  # of the update (out, in)
    torch.testing.assert_close(adapter.A.grad, (B @ R).T @ G, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.B.grad, G @ (R @ A).T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.R.grad, B.T @ G @ A.T, rtol=1e-4, atol=1e-5)
    through_all = (B @ (adapter.old + R)).T @ G
    assert adapter.A.grad.norm() < 0.3 * through_all.norm()


def test_without_a_new_part_a_and_b_stand_still() -> None:
    adapter = RoutedLinear(nn.Linear(6, 5), rank=3, spread=0.1, rows=None)
    adapter.old = torch.randn(3, 3)  # R is zero
    adapter(torch.randn(2, 4, 6)).sum().backward()
    assert not adapter.A.grad.any() and not adapter.B.grad.any() and adapter.R.grad.any()


def test_the_orthogonal_loss_is_what_the_new_part_has_in_the_span_of_the_old() -> None:
    adapter = RoutedLinear(nn.Linear(6, 5), rank=3, spread=0.1, rows=None)
    adapter.draw_routing(torch.Generator().manual_seed(1))
    assert adapter.penalty(None) == {}
    u, v = torch.randn(3), torch.randn(3)
    old = torch.outer(u, v) + 1e-3 * torch.randn(3, 3)
    adapter.basis, adapter.weight_of_penalty = leading_columns(old, 0.99), 2.0
    assert adapter.basis.shape == (3, 1) and leading_columns(old, 1 - 1e-9).shape[1] > 1
    inside = (u / u.norm()) @ adapter.R
    torch.testing.assert_close(adapter.penalty(None)["orthogonal"], 2 * (inside**2).sum(), rtol=1e-2, atol=0)


def test_each_task_adds_its_part_to_one_adapter_of_constant_size(stages_of) -> None:
    stages, train = stages_of("c_lora")
    adapter, total = stages.method.adapters[0], 0.0
    for task in range(3):
        stages.begin(task)
        assert 0 < adapter.R.abs().max() < 0.5
        assert adapter.old is None if task == 0 else torch.equal(adapter.old, total)
        assert set(train(task)) == ({"loss", "loss_data", "loss_orthogonal"} if task else {"loss"})
        total = total + adapter.R.detach()
        stages.end()
        torch.testing.assert_close(stages.memory[-1][f"{adapter.name}.R"], total)
        update = stages.updates[-1][adapter.name]
        torch.testing.assert_close(update.B @ update.A, (adapter.B @ total @ adapter.A).detach())
        assert len(update.A) == 4 and stages.method.deployed(task + 1) == [task]
        stages.engine.close()
