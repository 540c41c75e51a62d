"""A frozen linear layer plus a low-rank update, trained as one product and merged into the weight.

Legend: x (…, in), W (out, in), A (k, in), B (rows, k) where `rows` are the output rows that an adapter serves: all of
them, or the q, k or v part of an attention's fused projection. The update is W[rows] += scaling * B A.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from r1p_dist.adapters.merged_weight import Factors, MergedWeight
from r1p_dist.adapters.product import HALF_PRECISION, Product, composed_product
from r1p_dist.adapters.product_operator import compiled_product
from r1p_dist.adapters.recomputing import is_recomputing
from r1p_dist.distributed import gathered, start_sum_over_ranks, world_size


@dataclass(frozen=True)
class LayerPlan:
    """What the planner must know of an adapter beside its shapes.

    merged: ranks that a task leaves. vote: when votes are summed over ranks, None where there are none. voters: equal
    for adapters that vote together. gate_bytes: of a mean over ranks in every forward and backward.
    """

    merged: int
    vote: str | None = None
    voters: Any = None
    gate_bytes: int = 0


class LowRankLinear(nn.Module):
    """A frozen linear layer with one trainable low-rank update of its rows, and the updates merged so far.

    linear: the layer to freeze. rows: the output rows served, all by default; a part of the rows means that the layer
    is owned by the fused projection that runs it. dropout: the rate on the input of the update; dropout_kind:
    `element` draws for every element as LoRA does, `feature` once per batch for each input feature, at no cost.
    """

    # The module that computes the input, not a child of this one; the backward calls it again where it is known.
    recompute: nn.Module | None = None

    def __init__(
        self,
        linear: nn.Linear,
        scaling: float,
        dropout: float = 0.0,
        dropout_kind: str = "element",
        rows: slice | None = None,
    ):
        super().__init__()
        linear.requires_grad_(False)
        if rows is None:
            self.linear = linear
        else:
            object.__setattr__(self, "linear", linear)  # not a child: its owner holds it
        self.rows = rows or slice(0, linear.out_features)
        self.scaling = scaling
        self.dropout, self.dropout_kind = dropout, dropout_kind
        self.name = ""  # tower.block.layer, once it is on a backbone
        self.merged: list[Factors] = []  # per finished task
        # all merged columns; the B of `merged` are views of it
        self.past_B = linear.weight.new_zeros(self.out_features, 0)
        self._weight = MergedWeight(linear.weight, self.rows)
        self.is_recorded: bool | None = None  # as in `recorded`
        self.terms: dict[str, torch.Tensor] = {}

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

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Begins anew, with numbers that the generator draws. A collective under ZeRO-3."""
        raise NotImplementedError

    @staticmethod
    def votes(adapters: Sequence["LowRankLinear"], x: torch.Tensor) -> torch.Tensor | None:
        """Returns what must be summed over ranks before `factors`, or None.

        adapters: those that share the input x (batch, tokens, in).
        """
        return None

    @staticmethod
    def factors(adapters: Sequence["LowRankLinear"], x: torch.Tensor, votes: torch.Tensor | None) -> list[Factors]:
        """Returns each adapter's update for this batch, with gradient; votes: what `votes` returned, summed."""
        raise NotImplementedError

    def penalty(self, factors: Factors) -> dict[str, torch.Tensor]:
        """Returns terms of the loss that depend on this layer's update, by name, with gradient; they are summed over
        layers.

        Runs in the forward, where ZeRO-3 has the values: as often as that, but once per micro batch it counts. factors:
        the update of this batch. Names and graph must be the same on every rank, because ZeRO adds up gradients in the
        order in which they come.
        """
        return {}

    def plan(self) -> LayerPlan:
        """Returns what the planner must know beside the shapes; after a forward pass."""
        return LayerPlan(merged=len(self.A), voters=self.linear)

    def forward(self, x: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
        """Returns (batch, tokens, out): in training the frozen weight plus the update, in eval the weight alone.

        source: what `recompute` computed x from; without it, x is kept for the backward.
        """
        if not self.training:
            return F.linear(x, self.linear.weight, self.linear.bias)
        return adapted_product(self.linear, [self], x, self.recompute, source)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that forward and backward read from modules that they do not call."""
        return [*self.linear.parameters(), *_parameters(self.recompute)]

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Returns the parameters that a task trains, by their names in this module."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what a task in progress has beside its parameters; equal on every rank."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Takes back what `state` returned."""

    def set_weight(self, updates: Sequence[Factors]) -> None:
        """Writes W = round(W_0 + sum of the updates), as `MergedWeight.set` does."""
        self._weight.set(updates)

    def merge_update(self, update: Factors) -> None:
        """Merges one task's update into the frozen weight, after those merged before."""
        self.set_merged([*self.merged, update])

    def unmerge(self, task: int) -> None:
        """Takes the update of one merged task (its index, from 0) out of the weight; the others stay as they are."""
        self.set_merged([update for index, update in enumerate(self.merged) if index != task])

    def unmerge_all(self) -> None:
        """Gives back the pristine weight and forgets what was merged."""
        self.set_merged([])

    def set_merged(self, updates: Sequence[Factors]) -> None:
        """Makes these updates, one per task, all that is merged into the weight."""
        if not updates and self._weight.is_pristine:
            return
        self.past_B = torch.cat([self.past_B[:, :0], *(update.B for update in updates)], dim=1)
        columns = self.past_B.split([update.B.shape[1] for update in updates], dim=1)
        self.merged = [update._replace(B=B) for update, B in zip(updates, columns, strict=True)]
        self.set_weight(self.merged)

    def merged_delta(self) -> torch.Tensor:
        """Returns the sum of all merged updates, (rows, in), fp32."""
        delta = torch.zeros(self.out_features, self.in_features, device=self.linear.weight.device)
        for update in self.merged:
            delta += update.scaling * update.B @ update.A
        return delta


@contextmanager
def recorded(adapters: Sequence[LowRankLinear]) -> Iterator[dict[str, torch.Tensor]]:
    """Opens a micro batch: the first forward of each adapter in it votes and counts, further ones do not.

    The dict that is given has the adapters' penalties at the end, by name, summed over layers.
    """
    for adapter in adapters:
        adapter.is_recorded, adapter.terms = False, {}
    found: dict[str, torch.Tensor] = {}
    yield found
    found.update(take_penalties(adapters))
    for adapter in adapters:
        # the flag as the first forward found it: when a checkpoint runs that again, compiled code must be the same
        adapter.is_recorded = False


def take_penalties(adapters: Sequence[LowRankLinear]) -> dict[str, torch.Tensor]:
    """Returns the penalties of the adapters' last forward, by name, summed over layers, and keeps none of them."""
    terms: dict[str, list[torch.Tensor]] = {}
    for adapter in adapters:
        for name, term in adapter.terms.items():
            terms.setdefault(name, []).append(term)
        adapter.terms = {}
    return {name: torch.stack(parts).sum() for name, parts in terms.items()}


def fill_uniform(parameter: nn.Parameter, bound: float, generator: torch.Generator | None) -> None:
    """Fills a parameter from U(-bound, bound): the same numbers, rounded, on every device and in every precision."""
    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def full_values(*parameters: nn.Parameter) -> list[torch.Tensor]:
    """Returns fp32 copies of the parameters' full values; a collective under ZeRO-3."""
    with gathered(parameters):
        return [parameter.detach().float().clone() for parameter in parameters]


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def adapted_product(
    linear: nn.Linear,
    adapters: Sequence[LowRankLinear],
    x: torch.Tensor,
    recompute: nn.Module | None = None,
    source: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns x W^T + bias plus the updates of the adapters, in training; x (batch, tokens, in).

    recompute, source: x = recompute(source), for example a LayerNorm; the backward then computes x again instead of
    keeping it. The adapters share the input, so they share one vote, one dropout mask and one big product.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # the meta device has none
        x = x.to(torch.get_autocast_dtype(device))
    kind = type(adapters[0])
    votes = kind.votes(adapters, x)
    frozen = None
    if votes is not None and world_size() > 1:
        frozen = _sum_votes(votes, linear, x, torch.compiler.is_compiling() or x.dtype in HALF_PRECISION)
    factors = kind.factors(adapters, x, votes)
    for adapter, factor in zip(adapters, factors, strict=True):
        terms = adapter.penalty(factor)  # also where it does not count: a checkpoint's second forward must be the same
        if not adapter.is_recorded and not is_recomputing():
            adapter.terms = terms
            adapter.is_recorded = None if adapter.is_recorded is None else True
    As = [factor.A for factor in factors]
    rate, dropout_kind = adapters[0].dropout, adapters[0].dropout_kind
    if rate > 0 and dropout_kind == "feature":
        keep = ((torch.rand(x.shape[-1], device=x.device) >= rate) / (1 - rate)).to(x.dtype)
        As = [A * keep for A in As]
    rows, scalings = [adapter.rows for adapter in adapters], [factor.scaling for factor in factors]
    dropout = rate if dropout_kind == "element" else 0.0
    if torch.compiler.is_compiling():
        chosen = [factor.chosen for factor in factors]
        As = [A if experts is None else A[experts] for A, experts in zip(As, chosen, strict=True)]
        Bs = [f.B if experts is None else f.B[:, experts] for f, experts in zip(factors, chosen, strict=True)]
        return compiled_product(linear, x, As, Bs, rows, scalings, dropout)
    product = Product(
        linear,
        rows,
        scalings,
        [factor.chosen for factor in factors],
        dropout=dropout,
        frozen=frozen,
        # not its __call__: ZeRO-3's hooks on it belong to the forward pass
        recompute=recompute.forward if recompute is not None and source is not None else None,
    )
    return composed_product(product, x, source, As, [factor.B for factor in factors])


# A collective on its way cannot be compiled: with several ranks, `global` votes cut a compiled block here.
@torch.compiler.disable
def _sum_votes(votes: torch.Tensor, linear: nn.Linear, x: torch.Tensor, waits: bool) -> torch.Tensor | None:
    """Sums the votes over ranks in place; returns the frozen product if it was computed in the meantime.

    waits: it was not. In half precision it comes after the votes, because a small update added to a rounded product is
    lost (see product.py), and compiled code computes it with the rest; `lagged` votes have nothing to wait for.
    """
    pending, frozen = start_sum_over_ranks(votes), None
    if not waits:
        with torch.no_grad():
            frozen = F.linear(x, linear.weight.to(x.dtype), linear.bias)
    pending.wait()
    return frozen


class FusedProjection(nn.Module):
    """An attention's fused projection: one frozen linear whose q, k and v rows may each have an adapter."""

    recompute: nn.Module | None = None  # as in LowRankLinear

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.parts = nn.ModuleDict()

    def forward(self, x: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
        """x (batch, tokens, in) -> (batch, tokens, q + k + v); source: what `recompute` computed x from."""
        training = [part for part in self.parts.values() if part.training]
        if not training:
            return F.linear(x, self.linear.weight, self.linear.bias)
        return adapted_product(self.linear, training, x, self.recompute, source)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that forward and backward read from modules that they do not call."""
        own = [parameter for part in self.parts.values() for parameter in part.parameters(recurse=False)]
        return [*self.linear.parameters(), *own, *_parameters(self.recompute)]
