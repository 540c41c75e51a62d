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


@pytest.mark.parametrize("keep", [2, 6, 9, None])
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_it_is_the_root_of_the_moment_by_its_leading_directions(moment, keep: int | None, ridge: float) -> None:
    values, vectors = torch.linalg.eigh(moment)
    others = max(0, 6 - (keep or 6))
    values[:others] = values[:others].mean()
    C = vectors @ torch.diag(values) @ vectors.T
    R = vectors @ torch.diag((values / values.mean() + ridge) ** -0.5) @ vectors.T
    R *= (C.trace() / (R @ C @ R).trace()).sqrt()
    whitening = Whitening.of(moment if keep is None else Sketch.of(moment, keep), ridge)
    A = torch.randn(3, 6, dtype=torch.float64)
    AR = whitening.times(A)
    torch.testing.assert_close(AR, A @ R)
    torch.testing.assert_close(whitening.moment(A, AR), A @ R @ C @ R @ A.T)


@pytest.mark.parametrize("keep", [2, None])
def test_inputs_of_nothing_leave_all_as_it_is(keep: int | None) -> None:
    A, nothing = torch.randn(3, 6), torch.zeros(6, 6)
    whitening = Whitening.of(nothing if keep is None else Sketch.of(nothing, keep), 0.01)
    assert torch.equal(whitening.times(A), A)
    assert not whitening.moment(A, A).any()


def test_what_past_inputs_lack_costs_nothing_in_single_precision_too() -> None:
    x = torch.randn(40, 6) * torch.tensor([9.0, 5.0, 2.0, 1.0, 1e-3, 0.0])
    C = x.T @ x / 40
    whitening = Whitening.of(C, 0.01)
    A = torch.zeros(1, 6)
    A[0, 5] = 1.0
    AR = whitening.times(A)
    assert AR.square().sum() > 100  # a step there is a long one
    assert whitening.moment(A, AR).abs() < 1e-5 * whitening.span
