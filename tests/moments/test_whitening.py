"""The whitening of a layer's inputs against the root of their moment itself."""

import pytest
import torch

from r1p_dist.moments.sketch import Sketch
from r1p_dist.moments.whitening import Whitening


@pytest.fixture
def moment() -> torch.Tensor:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5.0, 2.0, 1.0, 0.3, 0.1])
    turned, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    x = (x @ turned).double()
    return x.T @ x / 40


@pytest.mark.parametrize("keep", [2, 6, 9])
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_it_is_the_root_of_the_moment_by_its_leading_directions(moment, keep: int, ridge: float) -> None:
    values, vectors = torch.linalg.eigh(moment)
    others = max(0, 6 - keep)
    values[:others] = values[:others].mean()
    R = vectors @ torch.diag((values / values.mean() + ridge) ** -0.5) @ vectors.T
    R *= (values.sum() / (vectors.T @ R @ R @ vectors).diagonal().mul(values).sum()).sqrt()
    whitening = Whitening.of(Sketch.of(moment, keep), ridge)
    A = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(whitening.times(A), A @ R)
    sent = Whitening.of_tensor(whitening.tensor())
    torch.testing.assert_close(sent.times(A), whitening.times(A))


def test_the_inputs_keep_their_energy(moment) -> None:
    R = Whitening.of(Sketch.of(moment, 6), 0.01).times(torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close((R @ moment @ R).trace(), moment.trace())


def test_a_large_ridge_and_inputs_of_nothing_leave_all_as_it_is(moment) -> None:
    A = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(Whitening.of(Sketch.of(moment, 6), 1e9).times(A), A)
    assert torch.equal(Whitening.of(Sketch.of(torch.zeros_like(moment), 6), 0.01).times(A), A)
