"""The composed product as an operator of torch, which torch.compile keeps whole; product.py has what it computes.

Around it the compiler fuses what is small: the choice of experts, scaling, casts, LayerNorm and activation. Here the
input is an operand and the compiler decides what is kept for the backward; the weight is kept as it is, so ZeRO-3,
which takes it away between forward and backward, cannot be compiled.
"""

from collections.abc import Sequence

import torch

from r1p_dist.adapters.product import Product, backward_product, draw_seed, forward_product, rounded_rate


def compiled_product(
    linear: torch.nn.Linear,
    x: torch.Tensor,
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
    rows: Sequence[slice],
    scalings: Sequence[float],
    dropout: float,
) -> torch.Tensor:
    """Returns x (W + sum of scaling B A)^T + bias, (…, out), as `composed_product` does.

    As (k, in) and Bs (rows, k): the experts that take part, of each update.
    """
    dropout = rounded_rate(dropout)
    y, _ = _product(
        x.reshape(-1, x.shape[-1]),
        linear.weight.to(x.dtype),
        None if linear.bias is None else linear.bias.to(x.dtype),
        torch.cat(list(As)).to(x.dtype),
        [B.T.to(x.dtype) for B in Bs],
        [part.start for part in rows],
        list(scalings),
        dropout,
        draw_seed() if dropout else None,
    )
    return y.view(*x.shape[:-1], y.shape[-1])


@torch.library.custom_op("r1p_dist::product", mutates_args=())
def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    Bts: list[torch.Tensor],
    starts: list[int],
    scalings: list[float],
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return forward_product(_describe(Bts, starts, scalings, dropout, seed), x, A, Bts, weight, bias)


@_product.register_fake
def _(x, weight, bias, A, Bts, starts, scalings, dropout, seed):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(A.shape[0], x.shape[0])


@torch.library.custom_op("r1p_dist::product_backward", mutates_args=())
def _product_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    u: torch.Tensor,
    weight: torch.Tensor,
    A: torch.Tensor,
    Bts: list[torch.Tensor],
    starts: list[int],
    scalings: list[float],
    dropout: float,
    seed: torch.Tensor | None,
    wants_dx: bool,
) -> list[torch.Tensor]:
    product = _describe(Bts, starts, scalings, dropout, seed)
    dx, dA, dBts = backward_product(product, g, x, u, A, Bts, weight, wants_dx)
    # in the operands' types, as the fake says; an operator's results are tensors, so no dx is an empty one
    return [x.new_empty(0) if dx is None else dx, dA.to(A.dtype), *(dBt.to(A.dtype) for dBt in dBts)]


@_product_backward.register_fake
def _(g, x, u, weight, A, Bts, starts, scalings, dropout, seed, wants_dx):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wants_dx else x.new_empty(0)
    return [dx, A.new_empty(A.shape), *(Bt.new_empty(Bt.shape) for Bt in Bts)]


def _describe(
    Bts: list[torch.Tensor], starts: list[int], scalings: list[float], dropout: float, seed: torch.Tensor | None
) -> Product:
    rows = [slice(start, start + Bt.shape[1]) for start, Bt in zip(starts, Bts, strict=True)]
    number = None if seed is None else int(seed)
    return Product(None, rows, list(scalings), [None] * len(rows), dropout, seed=number)


def _keep(ctx, inputs, output) -> None:
    x, weight, _, A, Bts, ctx.starts, ctx.scalings, ctx.dropout, ctx.seed = inputs
    ctx.save_for_backward(x, output[1], weight, A, *Bts)


def _differentiate(ctx, g: torch.Tensor, _) -> tuple:
    x, u, weight, A, *Bts = ctx.saved_tensors
    wants_dx = ctx.needs_input_grad[0]
    options = (ctx.starts, ctx.scalings, ctx.dropout, ctx.seed, wants_dx)
    dx, dA, *dBts = _product_backward(g, x, u, weight, A, Bts, *options)
    return dx if wants_dx else None, None, None, dA, dBts, None, None, None, None


_product.register_autograd(_differentiate, setup_context=_keep)
