"""SLAO's initialisation and merge against the formulae written out (arXiv 2512.23017)."""

import math

import pytest
import torch

from r1p_dist.methods.slao import orthonormal_rows


def test_rows_are_orthonormal_span_the_same_and_keep_their_sign() -> None:
    A = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    Q = orthonormal_rows(A)
    torch.testing.assert_close(Q @ Q.T, torch.eye(3), atol=1e-6, rtol=0)
    # Gram-Schmidt, row by row
    rows: list[torch.Tensor] = []
    for row in A:
        for other in rows:
            row = row - (row @ other) * other
        rows.append(row / row.norm())
    torch.testing.assert_close(Q, torch.stack(rows), atol=1e-5, rtol=0)


def test_b_is_averaged_by_one_over_the_root_of_the_tasks_number(stages_of) -> None:
    stages, _ = stages_of("slao")
    trained = []
    for task in range(3):
        stages.begin(task)
        adapter = stages.method.adapters[0]
        if task:
            before_A, before_B = trained[-1]
            assert torch.equal(adapter.B, before_B), "goes on from the trained B, not from the merged one"
            torch.testing.assert_close(adapter.A @ adapter.A.T, torch.eye(len(adapter.A)), atol=1e-5, rtol=0)
            torch.testing.assert_close(before_A @ adapter.A.T @ adapter.A, before_A, atol=1e-5, rtol=0)
        with torch.no_grad():
            adapter.A.add_(torch.randn(adapter.A.shape))
            adapter.B.add_(torch.randn(adapter.B.shape))
        trained.append((adapter.A.detach().clone(), adapter.B.detach().clone()))
        stages.end()
        stages.engine.close()
    # in closed form: each B by 1/sqrt(i) of its own task, and by 1 - 1/sqrt(j) of each after it
    rates = [number**-0.5 for number in (1, 2, 3)]
    shares = [rate * math.prod(1 - later for later in rates[i + 1 :]) for i, rate in enumerate(rates)]
    assert sum(shares) == pytest.approx(1)
    merged = sum(share * B for share, (_, B) in zip(shares, trained, strict=True))
    update = stages.updates[-1][stages.method.adapters[0].name]
    torch.testing.assert_close(update.B, merged)
    assert torch.equal(update.A, trained[-1][0])
    # one pair and one merged B for any number of tasks
    assert [sum(value.numel() for value in memory.values()) for memory in stages.memory] == 3 * [
        sum(adapter.B.numel() for adapter in stages.method.adapters)
    ]
    assert {update.A.shape for update in (left[stages.method.adapters[0].name] for left in stages.updates)} == {(4, 32)}
    assert stages.method.deployed(3) == [2] and stages.method.merged(3) == []
