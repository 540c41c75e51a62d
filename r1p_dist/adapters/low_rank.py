"""A frozen linear layer plus a low-rank update, trained as one product and merged into the weight.

Legend: x (…, in), W (out, in), A (k, in), B (rows, k) where `rows` are the output rows that an adapter serves: all of
them, or the q, k or v part of an attention's fused projection. The update is W[rows] += scaling * B A.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from r1p_dist.distributed import drop_whole_copy, gathered, rank, sum_over_ranks


class Factors(NamedTuple):
    """A low-rank update of some rows of a frozen weight: delta = scaling * B A."""

    A: torch.Tensor  # (k, in)
    B: torch.Tensor  # (rows, k)
    scaling: float


class LowRankLinear(nn.Module):
    """A frozen linear layer with one trainable low-rank update of its rows, and the updates merged so far.

    linear: the layer to freeze. rows: the output rows served, all by default; a part of the rows means that the layer
    is owned by the fused projection that runs it. dropout: element dropout on the input of the update.
    """

    def __init__(self, linear: nn.Linear, scaling: float, dropout: float = 0.0, rows: slice | None = None):
        super().__init__()
        linear.requires_grad_(False)
        if rows is None:
            self.linear = linear
        else:
            object.__setattr__(self, "linear", linear)  # not a child: its owner holds it
        self.rows = rows or slice(0, linear.out_features)
        self.scaling = scaling
        self.dropout = dropout
        self.name = ""  # tower.block.layer, once it is on a backbone
        self.merged: list[Factors] = []  # per finished task
        self.past_B = linear.weight.new_zeros(
            self.out_features, 0
        )  # all merged columns; the B of `merged` are views of it
        self._pristine: torch.Tensor | None = None  # this rank's part of W_0

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def weight(self) -> nn.Parameter:
        """The frozen weight, where code that expects an nn.Linear looks for it (open_clip asks for its dtype)."""
        return self.linear.weight

    def votes(self, x: torch.Tensor) -> torch.Tensor | None:
        """Returns what must be summed over ranks before `factors`, or None. x: the input (batch, tokens, in)."""
        return None

    def factors(self, x: torch.Tensor, votes: torch.Tensor | None) -> Factors:
        """Returns the update for this batch, with gradient; votes: the sum over ranks of what `votes` returned."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (batch, tokens, out): in training the frozen weight plus the update, in eval the weight alone."""
        return adapted_product(self.linear, [self], x)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that the forward reads from modules it does not call."""
        return list(self.linear.parameters())

    @torch.no_grad()
    def set_weight(self, updates: Sequence[Factors]) -> None:
        """Writes W = round(W_0 + sum of the updates), in fp32 from the pristine weight, so no error accumulates.

        Under ZeRO-3 each rank computes its own slice of the flattened weight; there is no communication.
        """
        weight = self.linear.weight
        flat, start = _local_slice(weight, self.rows)
        if self._pristine is None:
            self._pristine = flat.clone()
        total = self._pristine.to(torch.float32, copy=True)
        for update in updates:
            total += _flat_delta(update, start, len(flat))
        flat.copy_(total)
        drop_whole_copy(weight)

    def merge_update(self, update: Factors) -> None:
        """Merges one task's update into the frozen weight, after those merged before."""
        self.past_B = torch.cat([self.past_B, update.B], dim=1)
        merged, start = [*self.merged, update], 0
        self.merged = []
        for past in merged:
            stop = start + past.B.shape[1]
            self.merged.append(past._replace(B=self.past_B[:, start:stop]))
            start = stop
        self.set_weight(self.merged)

    def unmerge_all(self) -> None:
        """Gives back the pristine weight and forgets what was merged."""
        self.merged, self.past_B = [], self.past_B[:, :0]
        self.set_weight([])

    def merged_delta(self) -> torch.Tensor:
        """Returns the sum of all merged updates, (rows, in), fp32."""
        delta = torch.zeros(self.out_features, self.in_features, device=self.linear.weight.device)
        for update in self.merged:
            delta += update.scaling * update.B @ update.A
        return delta


def _local_slice(weight: nn.Parameter, rows: slice) -> tuple[torch.Tensor, int]:
    """Returns what this rank stores of the rows: a flat view, and its offset within the rows' flattened elements.

    ZeRO-3 stores each rank's part of the flattened weight in `ds_tensor`; there the view can be empty.
    """
    if hasattr(weight, "ds_id"):
        in_features, stored, offset = weight.ds_shape[1], weight.ds_tensor.data, rank() * weight.ds_tensor.ds_numel
    else:
        in_features, stored, offset = weight.shape[1], weight.data, 0
    first, last = rows.start * in_features, rows.stop * in_features
    start = min(max(first, offset), last)
    stop = max(min(last, offset + stored.numel()), start)
    return stored.view(-1)[start - offset : stop - offset] if stop > start else stored.new_empty(0), start - first


def _flat_delta(update: Factors, start: int, length: int) -> torch.Tensor:
    """Returns elements start … start + length of the flattened scaling * B A, fp32."""
    in_features = update.A.shape[1]
    first, last = start // in_features, -(-(start + length) // in_features)
    delta = update.scaling * update.B[first:last].float() @ update.A.float()
    return delta.view(-1)[start - first * in_features :][:length]


def full_values(*parameters: nn.Parameter) -> list[torch.Tensor]:
    """Returns fp32 copies of the parameters' full values; a collective under ZeRO-3."""
    with gathered(parameters):
        return [parameter.detach().float().clone() for parameter in parameters]


def adapted_product(linear: nn.Linear, adapters: Sequence[LowRankLinear], x: torch.Tensor) -> torch.Tensor:
    """Returns x W^T + bias plus, in training, the updates of the adapters; x (batch, tokens, in)."""
    training = [adapter for adapter in adapters if adapter.training]
    if not training:
        return F.linear(x, linear.weight, linear.bias)
    local_votes = [adapter.votes(x) for adapter in training]
    votes = sum_over_ranks(torch.stack(local_votes)) if local_votes[0] is not None else local_votes
    factors = [adapter.factors(x, vote) for adapter, vote in zip(training, votes, strict=True)]
    rows = [adapter.rows for adapter in training]
    rate = training[0].dropout
    keep = _dropout_mask(x, rate) if rate > 0 else None
    tensors = [tensor for factor in factors for tensor in (factor.A, factor.B)]
    return _ComposedProduct.apply(linear, rows, [factor.scaling for factor in factors], rate, keep, x, *tensors)


class FusedProjection(nn.Module):
    """An attention's fused projection: one frozen linear whose q, k and v rows may each have an adapter."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.parts = nn.ModuleDict()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, tokens, in) -> (batch, tokens, q + k + v)."""
        return adapted_product(self.linear, list(self.parts.values()), x)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that the forward reads from modules it does not call."""
        own = [parameter for part in self.parts.values() for parameter in part.parameters(recurse=False)]
        return [*self.linear.parameters(), *own]


def _dropout_mask(x: torch.Tensor, rate: float) -> torch.Tensor:
    """Returns the elements kept, bool like x: one mask for all adapters that share the input."""
    return torch.rand_like(x, dtype=torch.float32) >= rate


class _ComposedProduct(torch.autograd.Function):
    """y = x (W + sum of scaling * B A)^T + bias as one product, gradients for x, A and B.

    Without dropout the update is added to a copy of W before the product. With dropout m the update has its own thin
    products: y = x W^T + scaling * (x * m) A^T B^T. The backward reads `linear.weight` again instead of saving it:
    ZeRO-3 gathers it once more for the backward and must not be kept from freeing it in between.
    """

    @staticmethod
    def forward(ctx, linear, rows, scalings, rate, keep, x, *factors):
        ctx.linear, ctx.rows, ctx.scalings, ctx.rate = linear, rows, scalings, rate
        ctx.save_for_backward(x, keep, *factors)
        As, Bs = factors[::2], factors[1::2]
        if keep is None:
            weight = _composed_weight(linear.weight, rows, scalings, As, Bs)
            return F.linear(x, weight, linear.bias)
        y = F.linear(x, linear.weight, linear.bias)
        kept = _kept(x, keep, rate)
        for row, scaling, A, B in zip(rows, scalings, As, Bs, strict=True):
            y[..., row] += (kept @ A.to(x.dtype).T) @ (scaling * B).to(x.dtype).T
        return y

    @staticmethod
    def backward(ctx, gradient):
        linear, rows, scalings = ctx.linear, ctx.rows, ctx.scalings
        x, keep, *factors = ctx.saved_tensors
        As, Bs = factors[::2], factors[1::2]
        need_x = ctx.needs_input_grad[5]
        kept = x if keep is None else _kept(x, keep, ctx.rate)
        flat_kept, flat_gradient = kept.flatten(0, -2), gradient.flatten(0, -2)
        gradient_x, thin_x = None, None
        if need_x:
            weight = linear.weight if keep is not None else _composed_weight(linear.weight, rows, scalings, As, Bs)
            gradient_x = gradient @ weight.to(gradient.dtype)
        results: list[torch.Tensor | None] = []
        for i, (row, scaling, A, B) in enumerate(zip(rows, scalings, As, Bs, strict=True)):
            g = flat_gradient[:, row]  # (n, rows)
            gB = scaling * (g @ B.to(g.dtype))  # (n, k)
            results.append((gB.T @ flat_kept).to(A.dtype) if ctx.needs_input_grad[6 + 2 * i] else None)
            results.append(
                (scaling * (g.T @ (flat_kept @ A.to(g.dtype).T))).to(B.dtype)
                if ctx.needs_input_grad[7 + 2 * i]
                else None
            )
            if need_x and keep is not None:
                thin = gB @ A.to(g.dtype)
                thin_x = thin if thin_x is None else thin_x + thin
        if thin_x is not None:
            gradient_x = gradient_x + _kept(thin_x.view_as(x), keep, ctx.rate)
        return (None,) * 5 + (gradient_x, *results)


def _composed_weight(weight, rows, scalings, As, Bs) -> torch.Tensor:
    """Returns a copy of the weight with the updates added to their rows."""
    composed = weight.detach().clone()
    for row, scaling, A, B in zip(rows, scalings, As, Bs, strict=True):
        composed[row].addmm_(B.to(weight.dtype), A.to(weight.dtype), alpha=scaling)
    return composed


def _kept(x: torch.Tensor, keep: torch.Tensor, rate: float) -> torch.Tensor:
    return x * keep / (1 - rate)
