"""What a method can learn from a pass over its data: moments of what layers read and of gradients, the Fisher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from r1p_dist.adapters import FusedProjection, LowRankLinear, Routing
from r1p_dist.distributed import owner, rank, sum_on_rank, sum_over_ranks
from r1p_dist.moments.sketch import Sketch, directions
from r1p_dist.protocol.trainer import Gradients, Need

if TYPE_CHECKING:
    from r1p_dist.backbones import Backbone


def modules_that_run(backbone: Backbone, adapters: Sequence[LowRankLinear]) -> dict[str, nn.Module]:
    """Returns by an adapter's name the module that is called with its input: the adapter, or the fused projection."""
    fused = {id(module.linear): module for module in backbone.modules() if isinstance(module, FusedProjection)}
    return {adapter.name: fused.get(id(adapter.linear), adapter) for adapter in adapters}


def token_counts(routing: Routing, x: torch.Tensor) -> torch.Tensor:
    """Returns how often each token of x (batch, tokens, in) counts, or of samples in one row (tokens, in): of padding
    none, of a prompt as often as it occurs.

    Rows and columns of a picture may stand in place of the tokens.
    """
    times = torch.ones(x.shape[:-1], device=x.device)
    if routing.lengths is not None:
        if routing.weights is not None:
            times = routing.weights.float().repeat_interleave(torch.tensor(routing.lengths, device=x.device))
        return times
    if routing.real is not None and routing.real.shape == x.shape[:-1]:
        times = routing.real.float()
    if routing.weights is not None and len(routing.weights) == len(x):
        times = times * routing.weights.view(-1, *[1] * (times.ndim - 1))
    return times


@dataclass(frozen=True)
class Sketching:
    """Moments wider than `above` are never formed, but sketched with `keep` directions as tokens come by."""

    above: int
    keep: int


class InputMoments:
    """The uncentred second moment of the input of each adapted linear, (in, in) fp32, the weighted mean over tokens.

    layers: by the name of the first adapter that reads an input, all that read the same one (q, k and v). A rank keeps
    those of the layers that it owns, in `moments`. Tokens of padding do not count; a prompt counts as often as it
    occurs. A token's gradient is that, at the layer's output, of a random projection of what the model gives out
    (`Backbone.outputs`). Its direction depends on the micro batch's number in the pass alone, so that all tasks are
    seen along the same ones; a layer that no gradient reaches has moments of zeros. by_sensitivity: the gradient's
    square is the token's weight, so that tokens count that the model depends on; reconstruction, as the Fisher of K-FAC
    (arXiv 1503.05671) has both factors but weighs no token. with_gradients: also keeps, in `gradients` by adapter, the
    sum of their outer products over tokens, (out, out). sketching: wide ones are in `sketches` instead, those of
    gradients as `<adapter>.gradient`; what a rank sends and its owner holds is then (in, 4 keep).
    """

    def __init__(
        self,
        backbone: Backbone,
        adapters: Sequence[LowRankLinear],
        by_sensitivity: bool = False,
        with_gradients: bool = False,
        sketching: Sketching | None = None,
    ) -> None:
        self._backbone, self._by_sensitivity, self._with_gradients = backbone, by_sensitivity, with_gradients
        self.needs: Need = "sensitivity" if by_sensitivity or with_gradients else "forward"
        self._modules: dict[str, nn.Module] = {}
        by_module: dict[nn.Module, list[str]] = {}
        self.layers: dict[str, list[str]] = {}
        for name, module in modules_that_run(backbone, adapters).items():
            names = by_module.setdefault(module, [])
            if not names:
                self.layers[name] = names
                self._modules[name] = module
            names.append(name)
        self.moments: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self.sketches: dict[str, Sketch] = {}
        self._adapters = {adapter.name: adapter for adapter in adapters}
        self._of_inputs, self._of_gradients = _Sums(sketching), _Sums(sketching)
        self._totals: dict[str, torch.Tensor] = {}  # of the tokens' weights, on this rank

    @contextmanager
    def watch(self) -> Iterator[None]:
        handles = []
        for number, (name, module) in enumerate(self._modules.items()):
            if self.needs == "forward":
                handles.append(module.register_forward_pre_hook(partial(self._see, number, name)))
            else:
                handles.append(module.register_forward_hook(partial(self._see_sensitivity, number, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for number, name in enumerate(self._modules):
            if name not in self._totals:
                self._add_zeros(number, name)
        totals = sum_over_ranks(torch.stack([self._totals[name] for name in self._modules])).tolist()
        of_layer = dict(zip(self._modules, totals, strict=True))
        # of a tower that saw nothing but pictures that stand in, zeros
        self.moments, wide = self._of_inputs.over({name: total or 1 for name, total in of_layer.items()})
        self.gradients, wide_gradients = self._of_gradients.over(dict.fromkeys(self._adapters, 1))
        self.sketches = wide | {f"{name}.gradient": sketch for name, sketch in wide_gradients.items()}

    def saw(self, gradients: Gradients | None) -> None:
        """The hooks have seen it."""

    def _see(self, number: int, name: str, module: nn.Module, inputs: tuple) -> None:
        x = inputs[0].detach()
        self._add(number, name, x, self._times(name, x))

    def _see_sensitivity(self, number: int, name: str, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        x = inputs[0].detach()
        times = self._times(name, x)

        def see(gradient: torch.Tensor) -> None:
            gradient = gradient.detach().float()
            weights = times * gradient.square().sum(-1) if self._by_sensitivity else times
            self._add(number, name, x, weights)
            if self._with_gradients:
                self._add_gradients(number, name, gradient, times)

        output.register_hook(see)

    def _times(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return token_counts(self._backbone.routing[name.partition(".")[0]], x)

    @torch.no_grad()
    def _add(self, number: int, name: str, x: torch.Tensor, weights: torch.Tensor) -> None:
        self._totals[name] = self._totals.get(name, 0) + weights.sum().double()
        self._of_inputs.add(name, x.float(), weights, owner(number))

    @torch.no_grad()
    def _add_gradients(self, number: int, name: str, gradient: torch.Tensor, times: torch.Tensor) -> None:
        for reader in self.layers[name]:
            self._of_gradients.add(reader, gradient[..., self._adapters[reader].rows], times, owner(number))

    def _add_zeros(self, number: int, name: str) -> None:
        """Adds no token, so that a layer that was not seen on any rank has moments too."""
        adapter, device = self._adapters[name], self._backbone.device
        self._add(number, name, torch.zeros(0, adapter.in_features, device=device), torch.zeros(0, device=device))
        if self._with_gradients:
            width = adapter.linear.out_features
            self._add_gradients(number, name, torch.zeros(0, width, device=device), torch.zeros(0, device=device))


class _Sums:
    """Sums over tokens, by name, of weight * x x^T, on the rank that owns each; of wide x, of their products."""

    def __init__(self, sketching: Sketching | None) -> None:
        self._sketching = sketching
        self._directions: dict[int, torch.Tensor] = {}  # by width
        self._sums: dict[str, torch.Tensor] = {}
        self._traces: dict[str, torch.Tensor] = {}  # of wide ones, on every rank

    def add(self, name: str, x: torch.Tensor, weights: torch.Tensor, owner_of_it: int) -> None:
        """x (..., width), weights (...)."""
        x, weighted = x.flatten(0, -2), (x * weights[..., None]).flatten(0, -2)
        width = x.shape[-1]
        if self._sketching is not None and width > self._sketching.above:
            if width not in self._directions:
                self._directions[width] = directions(width, self._sketching.keep).to(x.device)
            self._traces[name] = self._traces.get(name, 0) + (x * weighted).sum()
            x = x @ self._directions[width]
        found = sum_on_rank(weighted.T @ x, owner_of_it)
        if rank() == owner_of_it:
            self._sums[name] = self._sums.get(name, 0) + found

    def over(self, totals: Mapping[str, float]) -> tuple[dict[str, torch.Tensor], dict[str, Sketch]]:
        """Returns what this rank owns, over totals: matrices, and sketches of wide ones."""
        traces = dict[str, torch.Tensor]()
        if self._traces:
            traces = dict(zip(self._traces, sum_over_ranks(torch.stack(list(self._traces.values()))), strict=True))
        means = {name: value / totals[name] for name, value in self._sums.items()}
        keep = 0 if self._sketching is None else self._sketching.keep
        sketches = {
            name: Sketch.of_product(mean, traces[name] / totals[name], keep)
            for name, mean in means.items()
            if name in traces
        }
        return {name: mean for name, mean in means.items() if name not in traces}, sketches


def random_projection(outputs: Sequence[torch.Tensor], seed: int) -> torch.Tensor:
    """Returns the sum over samples of a random direction's share in what a model gives out, each (..., width); ().

    The direction is the same for all samples, whichever rank they are on, so that none depends on another.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(value.shape[-1], generator=generator) for value in outputs]
    pairs = zip(outputs, directions, strict=True)
    return torch.stack([(value.float() @ direction.to(value.device)).sum() for value, direction in pairs]).sum()


class FisherDiagonal:
    """The diagonal of the empirical Fisher, per trained number: the mean of squared gradients.

    Of whole micro batches over all ranks, at the cost of training on them, but by about the batch size smaller; or by
    sample, of each one's part of the loss, at the cost of a pass for each. Samples of a contrastive loss have parts
    that depend on the others of their batch.
    """

    def __init__(self, by_sample: bool = False) -> None:
        self.needs: Need = "samples" if by_sample else "gradients"
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        yield

    def saw(self, gradients: Gradients | None) -> None:
        assert gradients is not None  # it needs them
        self._count += 1
        for name, gradient in gradients.items():
            self._sums[name] = self._sums.get(name, 0) + gradient.square()

    @property
    def diagonal(self) -> dict[str, torch.Tensor]:
        """By the names of the trainable parameters."""
        return {name: total / self._count for name, total in self._sums.items()}
