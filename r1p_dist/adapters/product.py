"""The product of an adapted linear: x (W + scaling B A)^T + bias as one big product and thin ones, and its backward.

Legend: x (n, in) flattened samples and tokens, W (out, in), A (k, in), B (rows, k), kept = x with its dropped elements
at zero, u = A kept^T (k, n), g the gradient of the output (n, out). Thin operands lie wide, (k, n) and (k, rows): BLAS
takes up to ten times longer for the tall form of the same fp32 product.

Why the update is not added to W first: at 1,576 tokens both forms cost about the same, for the short prompts of the
text tower this one costs less, it needs no second copy of W, and in bf16 it keeps small updates. W lies on bf16's grid,
so an update below half a step of the grid vanishes in W + scaling B A; a rounded x W^T lies on that grid as well. Here
the update comes first and the big product is accumulated onto it, with one rounding at the end. The share of an update
that arrives in a bf16 output, for updates of 4e-5, 4e-4 and 4e-3 of the output (`python tools/benchmark.py precision`):

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
    keeps x itself.
    """

    linear: nn.Linear
    rows: list[slice]
    scalings: list[float]
    chosen: list[torch.Tensor | None]
    dropout: float = 0.0
    frozen: torch.Tensor | None = None
    recompute: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        self.dropout = round(self.dropout * _RATES) / _RATES
        self.scalings = [scaling / (1 - self.dropout) for scaling in self.scalings]
        # from the default generator, which activation checkpointing sets back for its second forward
        self._seed = torch.randint(2**63 - 1, ()).item() if self.dropout else 0

    def chunks(self, count: int, width: int, like: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor | None]]:
        """Yields the rows of x (count, width) in parts, each with its dropout mask (1 keeps, 0 drops) or None.

        like: a tensor of the device and type that the masks shall have.

        The masks are the same at every call: the backward draws them again. Each element is kept or dropped
        independently of all others; four share one 64-bit draw, so the rate is a multiple of 1 / 65,536, and the
        scaling uses that very rate.
        """
        generator = torch.Generator(like.device).manual_seed(self._seed) if self.dropout else None
        parts = -(-count * width // _CHUNK_ELEMENTS) if like.device.type == "cpu" else 1
        step = -(-count // parts) if count else 1
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            shape = (rows.stop - rows.start, width)
            yield rows, None if generator is None else self._mask(shape, generator).to(like.dtype)

    def _mask(self, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        size = shape[0] * shape[1]
        draws = torch.empty(-(-size // 4), dtype=torch.int64, device=generator.device)
        draws.random_(-(2**63), None, generator=generator)
        dropped = round(self.dropout * _RATES) - _RATES // 2 - 1  # the highest 16-bit value that drops
        return draws.view(torch.int16).clamp_(dropped, dropped + 1).sub_(dropped)[:size].view(shape)


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
        flat = x.reshape(-1, x.shape[-1])
        As = [A if chosen is None else A[chosen] for A, chosen in zip(As, product.chosen, strict=True)]
        Bts = [B.T if chosen is None else B.T[chosen] for B, chosen in zip(Bs, product.chosen, strict=True)]
        Bts = [(scaling * Bt).to(x.dtype) for Bt, scaling in zip(Bts, product.scalings, strict=True)]
        A = torch.cat(As).to(x.dtype)
        u = x.new_empty(len(A), len(flat))
        for part, mask in product.chunks(*flat.shape, flat):
            kept = flat[part] if mask is None else mask.mul_(flat[part])
            torch.mm(A, kept.T, out=u[:, part])
        ctx.product, ctx.ranks, ctx.pool_sizes = product, [len(A) for A in As], [B.shape[1] for B in Bs]
        # W is read again instead: ZeRO-3 gathers it once more for the backward and must be free to drop it until then
        ctx.save_for_backward(x if product.recompute is None else source, u, A, *Bts)
        return _output(product, flat, u.split(ctx.ranks), Bts).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        product = ctx.product
        saved, u, A, *Bts = ctx.saved_tensors
        saved = saved.reshape(-1, saved.shape[-1])
        g = gradient.reshape(-1, gradient.shape[-1])
        gs, us = [g[:, rows] for rows in product.rows], u.split(ctx.ranks)
        # summed over parts in fp32 at least
        dA, *dBts = (torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (A, *Bts))
        dx = g.new_empty(len(g), A.shape[1]) if ctx.needs_input_grad[2] else None
        for part, mask in product.chunks(len(g), A.shape[1], g):
            x = saved[part] if product.recompute is None else product.recompute(saved[part]).to(g.dtype)
            gB = torch.cat([Bt @ g_i[part].T for Bt, g_i in zip(Bts, gs, strict=True)])  # (k, n), scaled
            if dx is not None:
                torch.mm(gB.T, A, out=dx[part])
                if mask is not None:
                    dx[part] *= mask
            dA += gB @ (x if mask is None else mask.mul_(x))
            for dBt, u_i, g_i in zip(dBts, us, gs, strict=True):
                dBt += u_i[:, part] @ g_i[part]
        if dx is not None:
            dx = dx.addmm_(g, product.linear.weight.to(g.dtype)).view(*gradient.shape[:-1], -1)
        dBts = [dBt.mul_(scaling) for dBt, scaling in zip(dBts, product.scalings, strict=True)]
        dAs = map(_spread, dA.split(ctx.ranks), product.chosen, ctx.pool_sizes)
        dBts = map(_spread, dBts, product.chosen, ctx.pool_sizes)
        return None, None, dx, *dAs, *(dBt.T for dBt in dBts)


def _spread(gradient: torch.Tensor, chosen: torch.Tensor | None, count: int) -> torch.Tensor:
    """Returns the gradient of all `count` experts (rows) from that of the chosen ones; the others' is zero."""
    return gradient if chosen is None else gradient.new_zeros(count, gradient.shape[1]).index_copy_(0, chosen, gradient)


def _output(product: Product, x: torch.Tensor, us: Sequence[torch.Tensor], Bts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the output (n, out); the head of this file says why in this order."""
    weight, bias = product.linear.weight.to(x.dtype), product.linear.bias
    bias_last = bias is not None and x.dtype in HALF_PRECISION
    if product.frozen is not None:
        y = product.frozen.view(len(x), -1)
    elif bias is None or bias_last:
        y = x.new_zeros(len(x), len(weight))
    else:
        y = bias.to(x.dtype).expand(len(x), -1).clone()
    for rows, u, Bt in zip(product.rows, us, Bts, strict=True):
        y[:, rows].addmm_(u.T, Bt)
    if product.frozen is None:
        y.addmm_(x, weight.T)
    product.frozen = None
    return y.add_(bias) if bias_last else y
