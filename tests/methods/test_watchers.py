"""The second moments of a layer's inputs: which tokens count, and how often."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from r1p_dist.adapters import LoRALinear, Routing
from r1p_dist.protocol import InputMoments, Sketching

X = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))  # samples, tokens, in


def moment_of(routing: Routing, *batches: torch.Tensor, sketching: Sketching | None = None) -> torch.Tensor:
    adapter = LoRALinear(nn.Linear(5, 2), rank=1, rows=slice(0, 2))
    adapter.name = "image.0.q"
    backbone = SimpleNamespace(modules=lambda: [], routing={"image": routing})
    inputs = InputMoments(backbone, [adapter], sketching=sketching)
    with inputs.watch():
        for batch in batches:
            adapter(batch)
    return inputs.sketches["image.0.q"].whole() if inputs.sketches else inputs.moments["image.0.q"]


def test_without_more_knowledge_all_tokens_count_once_over_all_batches() -> None:
    flat = X.flatten(0, 1)
    torch.testing.assert_close(moment_of(Routing(), X[:2], X[2:]), flat.T @ flat / len(flat))


def test_padding_does_not_count_and_a_sample_as_often_as_it_occurs() -> None:
    real = torch.tensor([[True, True, False, False], [True, True, True, False]])
    found = moment_of(Routing(real=real, weights=torch.tensor([3, 1])), X[:2])
    tokens = torch.cat([X[0, :2]] * 3 + [X[1, :3]])
    torch.testing.assert_close(found, tokens.T @ tokens / 9)


def test_pictures_that_stand_in_do_not_count() -> None:
    found = moment_of(Routing(weights=torch.tensor([0, 2])), X[:2])
    torch.testing.assert_close(found, X[1].T @ X[1] / 4)
    assert moment_of(Routing(weights=torch.tensor([0, 0])), X[:2]).eq(0).all()


def test_a_wide_input_leaves_a_sketch_of_the_same_moment() -> None:
    real = torch.tensor([[True, True, False, False], [True, True, True, False]])
    routing = Routing(real=real, weights=torch.tensor([3, 1]))
    whole = moment_of(routing, X[:2], X[1:])
    sketch = moment_of(routing, X[:2], X[1:], sketching=Sketching(above=4, keep=5))
    torch.testing.assert_close(sketch, whole)
    assert moment_of(routing, X[:2], X[1:], sketching=Sketching(above=5, keep=5)).equal(whole)


@pytest.mark.parametrize("sketching", [None, Sketching(above=1, keep=1)])
def test_a_layer_that_no_gradient_reaches_has_moments_of_zeros(sketching: Sketching | None) -> None:
    q, k, unread = (LoRALinear(nn.Linear(5, 6), rank=1, rows=slice(0, rows)) for rows in (6, 6, 2))
    for adapter, name in ((q, "q"), (k, "k"), (unread, "unread")):
        adapter.name = f"image.0.{name}"
    backbone = SimpleNamespace(modules=lambda: [], routing={"image": Routing()}, device=X.device)
    inputs = InputMoments(backbone, [q, k, unread], by_sensitivity=True, with_gradients=True, sketching=sketching)
    with inputs.watch():
        y = q(X)
        unread(y[..., :5])  # as the last blocks of a tower of which an earlier one is read
        torch.autograd.grad(y.sum(), [q.A, q.B])
    found = {**inputs.moments, **{f"{name}.gradient": moment for name, moment in inputs.gradients.items()}}
    found |= {name: sketch.whole() for name, sketch in inputs.sketches.items()}
    flat = X.flatten(0, 1)
    torch.testing.assert_close(found["image.0.q"].trace(), (flat.T @ flat / len(flat)).trace())
    torch.testing.assert_close(found["image.0.q.gradient"], torch.full((6, 6), float(len(flat))))  # of rank one
    for name, width in (("k", 6), ("unread", 2)):
        assert torch.equal(found[f"image.0.{name}"], torch.zeros(5, 5))
        assert torch.equal(found[f"image.0.{name}.gradient"], torch.zeros(width, width))
