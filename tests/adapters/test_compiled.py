"""Compiled blocks: no break in their graph, the same losses, votes and gradients as eager ones."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from r1p_dist import attach_pool
from r1p_dist.adapters import recorded
from r1p_dist.adapters.pool import share_votes
from r1p_dist.adapters.product_operator import _product, compiled_product
from r1p_dist.backbones.compiling import compile_blocks
from r1p_dist.engine import resolve_deepspeed
from r1p_dist.errors import InputError
from r1p_dist.methods import make_method
from r1p_dist.moments.sketch import Sketch
from r1p_dist.moments.whitening import Whitening
from r1p_dist.recipes import load_config
from tests.small_clip import make_backbone
from tests.test_parity import PROMPTS, global_batch

IN, OUT = 6, 9
# torch's own, while it compiles
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def operands(dtype: torch.dtype = torch.float64) -> list:
    """x, weight, bias, A, Bts, starts, scalings: an update of the rows 0 … 4 by two experts, one of 5 … 8 by three."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, IN), (OUT, IN), (OUT,), (5, IN), (2, 5), (3, 4)]
    x, weight, bias, A, *Bts = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [x, weight, bias, A, Bts, [0, 5], [0.5, 2.0]]


def test_the_operator_is_registered_as_torch_demands() -> None:
    x, weight, bias, A, Bts, *numbers = operands()
    leaves = [tensor.requires_grad_() for tensor in (x, A, *Bts)]
    for seed, dropout in ((None, 0.0), (torch.tensor(3), 0.25)):
        torch.library.opcheck(_product, (leaves[0], weight, bias, leaves[1], leaves[2:], *numbers, dropout, seed))


def test_the_operator_computes_the_dense_formula() -> None:
    x, weight, bias, A, Bts, starts, scalings = operands()
    linear = nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False)
    linear.weight.copy_(weight), linear.bias.copy_(bias)
    leaves = [x, A[:2], A[2:], Bts[0].T, Bts[1].T]
    ours, dense = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    rows = [slice(0, 5), slice(5, 9)]
    y = compiled_product(linear, ours[0][None], ours[1:3], ours[3:], rows, scalings, 0.0)[0]
    delta = torch.cat([scale * B @ A for scale, A, B in zip(scalings, dense[1:3], dense[3:], strict=True)])
    expected = dense[0] @ (weight + delta).T + bias
    torch.testing.assert_close(y, expected)
    gradients = (torch.autograd.grad(out.square().sum(), into) for out, into in ((y, ours), (expected, dense)))
    torch.testing.assert_close(*gradients)


def train(compiles: bool, checkpoints: bool, past: bool, options: dict) -> list[Sequence[torch.Tensor]]:
    """Three steps of a small CLIP; returns per step the loss, gradients and counts."""
    backbone = make_backbone(layers=1)  # blocks are compiled one by one, for seconds each
    adapters = attach_pool(backbone, rank=6, active=3, merged=2, **options).adapters
    if compiles:
        torch.compiler.reset()
        compile_blocks(backbone.blocks, fullgraph=True, backend="aot_eager")
    if checkpoints:
        backbone.checkpoint_blocks()
    prepare = backbone.preparer(PROMPTS)
    torch.manual_seed(0)
    for adapter in adapters:
        nn.init.normal_(adapter.B, std=0.1)
        if past:
            adapter.orthogonal_to = torch.randn(adapter.out_features, 2)
    found = []
    for step in range(3):
        with recorded(adapters) as penalties:
            loss = backbone.loss(backbone, prepare(global_batch(0, step, 8)))
        (loss + sum(penalties.values())).backward()
        share_votes(adapters)
        gradients = [p.grad for adapter in adapters for p in adapter.parameters() if p.grad is not None]
        counts = [adapter.activation_counts.clone() for adapter in adapters]
        found.append([loss.detach(), sum(penalties.values(), torch.zeros(())).detach(), *gradients, *counts])
        backbone.zero_grad()
    assert len(penalties) == past
    return found


CASES = {
    "lagged votes, past tasks, element dropout": (False, True, {"vote": "lagged", "dropout": 0.2}),
    "local votes, gates, checkpointing": (True, False, {"vote": "local", "router_grad": "gated"}),
    "global votes of one rank, mean token, feature dropout": (
        False,
        False,
        {"guide": "mean", "dropout": 0.2, "dropout_kind": "feature"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*list(CASES)[:2], pytest.param(list(CASES)[2], marks=pytest.mark.campaign)])
def test_compiled_blocks_give_what_eager_ones_give(case: str) -> None:
    eager, compiled = (train(compiles, *CASES[case]) for compiles in (False, True))
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def metric_loss(compiles: bool) -> tuple[torch.Tensor, ...]:
    """Returns the loss, steady's penalty and gradients of a small CLIP's step; of the wide input, roots of sketches."""
    method = make_method(load_config("mini_mtil_dac", ["method=steady", "options.rank=4"]), make_backbone(layers=1))
    backbone, generator = method.backbone, torch.Generator().manual_seed(0)
    if compiles:
        torch.compiler.reset()
        compile_blocks(backbone.blocks, fullgraph=True, backend="aot_eager")
    for adapter in method.adapters:
        x, y = (torch.randn(40, width, generator=generator) for width in (adapter.in_features, adapter.out_features))
        inner = x.T @ x if adapter.in_features < 64 else Sketch.of(x.T @ x, 6)
        adapter.whitening, adapter.outer, adapter.scale = Whitening.of(inner, 0.1), Whitening.of(y.T @ y, 0.1), 1e-3
        nn.init.normal_(adapter.B, std=0.1, generator=generator)
    loss, terms = method.loss(backbone, backbone.preparer(PROMPTS)(global_batch(0, 0, 8)))
    loss.backward()
    return loss.detach(), terms["inputs"], *(p.grad for p in method.trainable_parameters().values())


@pytest.mark.slow
def test_compiled_blocks_are_held_to_past_inputs_as_eager_ones_are() -> None:
    eager, compiled = metric_loss(False), metric_loss(True)
    assert eager[1] > 0
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_weights_that_zero_takes_away_are_not_compiled() -> None:
    config = load_config("mini_mtil_dac", ["train.compile=true", "deepspeed.config=zero3"])
    with pytest.raises(
        InputError, match="train.compile=true with deepspeed.config=zero3: .* use deepspeed.config=zero2"
    ):
        resolve_deepspeed(config, 1)
