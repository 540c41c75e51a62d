"""O-LoRA's penalty against the formula written out (the released code's, arXiv 2310.14152)."""

import torch
from torch import nn

from r1p_dist.adapters import Factors
from r1p_dist.methods.o_lora import OrthogonalLinear


def test_the_penalty_is_the_sum_of_all_overlaps_with_past_rows() -> None:
    adapter = OrthogonalLinear(nn.Linear(6, 5), rank=2)
    factors = Factors(torch.randn(2, 6), torch.randn(5, 2), 0.5)
    assert adapter.penalty(factors) == {}
    adapter.past_A, adapter.weight_of_penalty = torch.randn(3, 6), 0.25
    expected = sum(abs(sum(past[i] * row[i] for i in range(6))) for past in adapter.past_A for row in factors.A)
    torch.testing.assert_close(adapter.penalty(factors)["orthogonal"], 0.25 * expected)


def test_past_rows_are_those_of_all_finished_tasks(stages_of) -> None:
    stages, train = stages_of("o_lora", "options.weight=2.0")
    rows = []
    for task in range(3):
        stages.begin(task)
        first = stages.method.adapters[0]
        assert (first.past_A is None) if task == 0 else torch.equal(first.past_A, torch.cat(rows))
        terms = train(task)
        assert set(terms) == ({"loss", "loss_data", "loss_orthogonal"} if task else {"loss"})
        rows.append(first.A.detach().clone())
        stages.end()
        stages.engine.close()
