"""How far a finished stage moved what each layer gives out on the inputs of the tasks before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from r1p_dist.adapters import Factors, LowRankLinear, Update
from r1p_dist.distributed import sum_over_ranks
from r1p_dist.protocol.watchers import modules_that_run, token_counts

if TYPE_CHECKING:
    from r1p_dist.backbones import Backbone

TOKENS = 256  # of a forward pass that are looked at, spread evenly


class Drift:
    """sqrt(sum |dW x|^2 / sum |W x + bias|^2) of each adapted linear, over tokens x that it reads while it is watched.

    dW: what the stage changed the weight by, W: the weight before. x comes from the model after the stage, so that a
    layer counts its own change and not that of the layers below. Padding does not count, nor do the single tokens of a
    decoder that answers. It costs thin products with a few tokens of each forward pass, which is made anyway.
    """

    def __init__(self, backbone: Backbone, adapters: Sequence[LowRankLinear], change: Mapping[str, Factors]) -> None:
        """change: as of `change_between`, of some of the adapters."""
        self._backbone, self._change = backbone, change
        self._adapters = [adapter for adapter in adapters if adapter.name in change]
        self._sums = {adapter.name: torch.zeros(2, device=backbone.device) for adapter in self._adapters}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """A context in which forward passes of the model after the stage, in eval mode, are measured."""
        modules = modules_that_run(self._backbone, self._adapters)
        hooks = [
            modules[adapter.name].register_forward_hook(partial(self._see, adapter.name, adapter.rows))
            for adapter in self._adapters
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def by_layer(self) -> dict[str, float]:
        """Returns the drift of each layer that read anything; a collective."""
        if not self._sums:
            return {}
        sums = sum_over_ranks(torch.stack([*self._sums.values()]).double()).tolist()
        found = zip(self._sums, sums, strict=True)
        return {name: (moved / before) ** 0.5 for name, (moved, before) in found if before}

    def _see(self, name: str, rows: slice, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        x = inputs[0]
        if x.ndim == 3 and x.shape[1] == 1:
            return  # hundreds of them would cost more than they tell
        counts = token_counts(self._backbone.routing[name.partition(".")[0]], x).flatten()
        chosen = slice(None, None, -(-len(counts) // TOKENS) or 1)
        x, y = x.flatten(0, -2)[chosen].float(), output.flatten(0, -2)[chosen, rows].float()
        A, B, scaling, _ = self._change[name]
        moved = scaling * (x @ A.T.to(x)) @ B.T.to(x)
        sizes = torch.stack([moved.square().sum(-1), (y - moved).square().sum(-1)])
        self._sums[name] += sizes @ counts[chosen]


def change_between(before: Sequence[Mapping[str, Update]], after: Sequence[Mapping[str, Update]]) -> dict[str, Factors]:
    """Returns by layer the sum of the updates `after` less that of those `before`, all of them low-rank."""
    signed = [(1, updates) for updates in after] + [(-1, updates) for updates in before]
    found = {}
    for name in after[0] if after else ():
        # those of an adapter are Factors
        parts: list[tuple[int, Factors]] = [(sign, updates[name]) for sign, updates in signed]  # pyright: ignore
        A = torch.cat([update.A for _, update in parts])
        B = torch.cat([sign * update.scaling * update.B for sign, update in parts], dim=1)
        found[name] = Factors(A, B, 1.0)
    return found
