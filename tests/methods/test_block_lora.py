"""Block-LoRA's sum of blocks against the assembled update, and how many numbers it trains (arXiv 2501.16720)."""

import pytest
import torch
from torch import nn

from r1p_dist.errors import InputError
from r1p_dist.methods.block_lora import BlockLinear
from r1p_dist.recipes import load_config


def test_the_sum_of_blocks_is_the_assembled_update() -> None:
    torch.manual_seed(0)
    adapter = BlockLinear(nn.Linear(10, 9), rank=8, blocks=4, alpha=2.0, dropout=0.0, rows=None)
    assert adapter.A.shape == (2, 10) and adapter.B.shape == (4, 9, 2)
    assert sum(p.numel() for p in adapter.trainable_parameters().values()) == 10 * 8 // 4 + 9 * 8
    nn.init.normal_(adapter.B)
    blocks = [B @ adapter.A for B in adapter.B]
    # a LoRA of rank 8: blocks beside one another, with A four times below itself
    assembled = torch.cat(list(adapter.B), dim=1) @ torch.cat([adapter.A] * 4)
    torch.testing.assert_close(sum(blocks), assembled, rtol=1e-4, atol=1e-5)
    x, g = torch.randn(3, 5, 10), torch.randn(3, 5, 9)
    y = adapter(x)
    torch.testing.assert_close(y - adapter.linear(x), 2 / 8 * x @ assembled.T, rtol=1e-4, atol=1e-5)
    y.backward(g)
    G = torch.einsum("bto,bti->oi", g, x)
    torch.testing.assert_close(adapter.A.grad, 2 / 8 * sum(B.T @ G for B in adapter.B), rtol=1e-4, atol=1e-5)
    for gradient in adapter.B.grad:
        torch.testing.assert_close(gradient, 2 / 8 * G @ adapter.A.T, rtol=1e-4, atol=1e-5)
    update = adapter.update()
    torch.testing.assert_close(update.scaling * update.B @ update.A, (2 / 8 * assembled).detach())


def test_each_task_begins_anew_and_is_merged(stages_of) -> None:
    stages, train = stages_of("block_lora")
    adapter, pristine = stages.method.adapters[0], stages.method.adapters[0].linear.weight.detach().clone()
    for task in range(2):
        stages.begin(task)
        assert not adapter.B.any() and len(adapter.merged) == task
        train(task)
        assert adapter.B.any()
        stages.end()
        stages.engine.close()
    sums = [update[adapter.name].scaling * update[adapter.name].B @ update[adapter.name].A for update in stages.updates]
    torch.testing.assert_close(adapter.linear.weight[adapter.rows], pristine[adapter.rows] + sums[0] + sums[1])


def test_blocks_must_divide_the_rank() -> None:
    with pytest.raises(InputError, match="options.rank=6 must be a multiple of options.blocks=4"):
        load_config("mini_mtil_dac", ["method=block_lora", "options.rank=6", "options.blocks=4"])
