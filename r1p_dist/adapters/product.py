"""The product of an adapted linear: x (W + scaling B A)^T + bias as one big product and thin ones, and its backward.

Legend: x (n, in) flattened samples and tokens, W (out, in), A (k, in), B (rows, k), kept = x with its dropped elements
at zero, u = A kept^T (k, n), g the gradient of the output (n, out). Thin operands lie wide, (k, n) and (k, rows): BLAS
takes up to ten times longer for the tall form of the same fp32 product.

Why the update is not added to W first: at 1,576 tokens both forms cost about the same, for the short prompts of the
text tower this one costs less, it needs no second copy of W, and in bf16 it keeps small updates. W lies on bf16's grid,
so an update below half a step of the grid vanishes in W + scaling B A; a rounded x W^T lies on that grid as well. Here
the update comes first and the big product is accumulated onto it, with one rounding at the end. The share of an update
that arrives in a bf16 output, for updates of 4e-5, 4e-4 and 4e-3 of it (`python tools/dev/benchmark.py precision`):

    W + update, then the product                0.02  0.19  0.93
    product, then the update added              0.02  0.21  0.96
    bias + update, then the product added       0.08  0.75  1.00
    update, then the product added, then bias   0.79  0.97  1.00    <- in bf16 and fp16

In fp32 nothing of this matters and the bias comes first, which saves a pass over the output.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable

HALF_PRECISION = (torch.bfloat16, torch.float16)
_RATES = 1 << 16  # dropout rates are multiples of 1 / _RATES
_CHUNK_ELEMENTS = 1 << 20  # rows are worked on in parts of so many elements on CPU, to stay in the cache


@dataclass
class Product:
    """One call of an adapted linear: what its forward and backward need beside tensors that carry gradients.

    rows: the output rows of each update. chosen: the experts of each that take part, None for all. dropout: the rate of
    element dropout on the updates' input. frozen: x W^T + bias where it was computed already; it becomes the output.
    recompute: gives x again from the tensor that is kept for the backward in its place, for any part of its rows; None
    keeps x itself. seed: of the dropout masks, drawn where none is given.
    """

    linear: nn.Linear
    rows: list[slice]
    scalings: list[float]
    chosen: list[torch.Tensor | None]
    dropout: float = 0.0
    frozen: torch.Tensor | None = None
    recompute: Callable[[torch.Tensor], torch.Tensor] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self.dropout = rounded_rate(self.dropout)
        self.scalings = [scaling / (1 - self.dropout) for scaling in self.scalings]
        if self.dropout and self.seed is None:
            self.seed = int(draw_seed())

    def parts(self, count: int, width: int, like: torch.Tensor) -> list[slice]:
        """Returns the parts that the rows of x (count, width) are worked on in; one on an accelerator."""
        number = -(-count * width // _CHUNK_ELEMENTS) if like.device.type == "cpu" else 1
        step = -(-count // max(1, number))
        return [slice(start, min(start + step, count)) for start in range(0, count, step)] if count else [slice(0, 0)]

    def chunks(self, count: int, width: int, like: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor | None]]:
        """Yields the rows of x (count, width) in parts, each with its dropout mask (1 keeps, 0 drops) or None.

        like: a tensor of the device and type that the masks shall have.

        The masks are the same at every call: the backward draws them again. Each element is kept or dropped
        independently of all others; four share one 64-bit draw, so the rate is a multiple of 1 / 65,536, and the
        scaling uses that very rate.
        """
        generator = torch.Generator(like.device).manual_seed(self.seed) if self.dropout else None
        for rows in self.parts(count, width, like):
            shape = (rows.stop - rows.start, width)
            yield rows, None if generator is None else self._mask(shape, generator).to(like.dtype)

    def _mask(self, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        size = shape[0] * shape[1]
        draws = torch.empty(-(-size // 4), dtype=torch.int64, device=generator.device)
        draws.random_(-(2**63), None, generator=generator)
        dropped = round(self.dropout * _RATES) - _RATES // 2 - 1  # the highest 16-bit value that drops
        return draws.view(torch.int16).clamp_(dropped, dropped + 1).sub_(dropped)[:size].view(shape)


def rounded_rate(dropout: float) -> float:
    """Returns the nearest rate that masks can have."""
    return round(dropout * _RATES) / _RATES


def draw_seed() -> torch.Tensor:
    """Returns a seed () on the CPU.

    It comes from the default generator, which activation checkpointing sets back for its second forward.
    """
    return torch.randint(2**63 - 1, ())


def composed_product(
    product: Product,
    x: torch.Tensor,
    source: torch.Tensor | None,
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Returns x (W + sum of scaling B A)^T + bias, (…, out), with gradients for x, every A and every B.

    x (…, in); source: what `product.recompute` takes; it gets no gradient from here.
    """
    source = None if source is None else source.detach()
    return _ComposedProduct.apply(product, source, x, *As, *Bs)


class _ComposedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, product, source, x, *factors):
        As, Bs = factors[: len(product.rows)], factors[len(product.rows) :]
        As = [A if chosen is None else A[chosen] for A, chosen in zip(As, product.chosen, strict=True)]
        Bts = [B.T if chosen is None else B.T[chosen] for B, chosen in zip(Bs, product.chosen, strict=True)]
        ctx.product, ctx.ranks, ctx.pool_sizes = product, [len(A) for A in As], [B.shape[1] for B in Bs]
        A = (As[0] if len(As) == 1 else torch.cat(As)).to(x.dtype)
        Bts = [Bt.to(x.dtype) for Bt in Bts]
        y, u = forward_product(product, x.reshape(-1, x.shape[-1]), A, Bts, product.linear.weight, product.linear.bias)
        # W is read again instead: ZeRO-3 gathers it once more for the backward and must be free to drop it until then
        ctx.save_for_backward(x if product.recompute is None else source, u, A, *Bts)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        product = ctx.product
        saved, u, A, *Bts = ctx.saved_tensors
        saved = saved.reshape(-1, saved.shape[-1])
        g = gradient.reshape(-1, gradient.shape[-1])
        dx, dA, dBts = backward_product(product, g, saved, u, A, Bts, product.linear.weight, ctx.needs_input_grad[2])
        if dx is not None:
            dx = dx.view(*gradient.shape[:-1], -1)
        dAs = map(_spread, dA.split(ctx.ranks), product.chosen, ctx.pool_sizes)
        dBts = map(_spread, dBts, product.chosen, ctx.pool_sizes)
        return None, None, dx, *dAs, *(dBt.T for dBt in dBts)


def _spread(gradient: torch.Tensor, chosen: torch.Tensor | None, count: int) -> torch.Tensor:
    """Returns the gradient of all `count` experts (rows) from that of the chosen ones; the others' is zero."""
    return gradient if chosen is None else gradient.new_zeros(count, gradient.shape[1]).index_copy_(0, chosen, gradient)


def forward_product(
    product: Product,
    x: torch.Tensor,
    A: torch.Tensor,
    Bts: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output (n, out) and u = A kept^T (k, n); all operands are in the type of x (n, in).

    A (k, in): the chosen experts of all updates; Bts: of each (its k, its rows). The head of this file says why in this
    order.
    """
    u = x.new_empty(len(A), len(x))
    for part, mask in product.chunks(*x.shape, x):
        kept = x[part] if mask is None else mask.mul_(x[part])
        torch.mm(A, kept.T, out=u[:, part])
    us = u.split([len(Bt) for Bt in Bts])
    weight = weight.to(x.dtype)
    is_bias_last = bias is not None and x.dtype in HALF_PRECISION
    if product.frozen is not None:
        y = product.frozen.view(len(x), -1)
    elif bias is None or is_bias_last:
        y = x.new_zeros(len(x), len(weight))
    else:
        y = bias.to(x.dtype).expand(len(x), -1).clone()
    for rows, u_i, Bt, scaling in zip(product.rows, us, Bts, product.scalings, strict=True):
        y[:, rows].addmm_(u_i.T, Bt, alpha=scaling)
    if product.frozen is None:
        y.addmm_(x, weight.T)
    product.frozen = None
    return y.add_(bias) if is_bias_last else y, u


def backward_product(
    product: Product,
    g: torch.Tensor,
    saved: torch.Tensor,
    u: torch.Tensor,
    A: torch.Tensor,
    Bts: Sequence[torch.Tensor],
    weight: torch.Tensor,
    wants_dx: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, list[torch.Tensor]]:
    """Returns the gradients of x (n, in), A (k, in) and Bts from that of the output, g (n, out).

    saved (n, …): x, or what `product.recompute` computes it from. Sums over several parts are fp32 at least.
    """
    gs, us = [g[:, rows] for rows in product.rows], u.split([len(Bt) for Bt in Bts])
    dx = g.new_empty(len(g), A.shape[1]) if wants_dx else None
    dA, dBts = _Sum(), [_Sum() for _ in Bts]
    for part, mask in product.chunks(len(g), A.shape[1], g):
        x = saved[part] if product.recompute is None else product.recompute(saved[part]).to(g.dtype)
        gBs = [_scaled_mm(Bt, g_i[part].T, scaling) for Bt, g_i, scaling in zip(Bts, gs, product.scalings, strict=True)]
        gB = gBs[0] if len(gBs) == 1 else torch.cat(gBs)  # (k, n)
        if dx is not None:
            torch.mm(gB.T, A, out=dx[part])
            if mask is not None:
                dx[part] *= mask
        dA.add(gB @ (x if mask is None else mask.mul_(x)))
        for dBt, u_i, g_i, scaling in zip(dBts, us, gs, product.scalings, strict=True):
            dBt.add(_scaled_mm(u_i[:, part], g_i[part], scaling))
    if dx is not None:
        dx.addmm_(g, weight.to(g.dtype))
    return dx, dA.total, [dBt.total for dBt in dBts]


def _scaled_mm(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)


class _Sum:
    """A sum of tensors: in their own type where there is one, in fp32 at least where there are more."""

    total: torch.Tensor | None = None

    def add(self, part: torch.Tensor) -> None:
        if self.total is None:
            self.total = part
        else:
            wide = torch.promote_types(part.dtype, torch.float32)
            self.total = self.total.to(wide).add_(part)
