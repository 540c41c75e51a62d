"""What a method can learn from a pass over its data: moments of the layers' inputs, and the diagonal of the Fisher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from r1p_dist.adapters import FusedProjection, LowRankLinear
from r1p_dist.distributed import owner, rank, sum_on_rank, sum_over_ranks

if TYPE_CHECKING:
    from r1p_dist.backbones import Backbone
    from r1p_dist.protocol.trainer import Gradients


class InputMoments:
    """The uncentred second moment of the input of each adapted linear, (in, in) fp32, the mean over real tokens.

    layers: by the name of the first adapter that reads an input, all that read the same one (q, k and v). A rank keeps
    those of the layers that it owns, in `moments`. Tokens of padding do not count; a prompt counts as often as it
    occurs.
    """

    needs_gradients = False

    def __init__(self, backbone: Backbone, adapters: Sequence[LowRankLinear]) -> None:
        self._backbone = backbone
        fused = {id(module.linear): module for module in backbone.modules() if isinstance(module, FusedProjection)}
        self._modules: dict[str, nn.Module] = {}
        by_linear: dict[int, list[str]] = {}
        self.layers: dict[str, list[str]] = {}
        for adapter in adapters:
            names = by_linear.setdefault(id(adapter.linear), [])
            if not names:
                self.layers[adapter.name] = names
                self._modules[adapter.name] = fused.get(id(adapter.linear), adapter)
            names.append(adapter.name)
        self.moments: dict[str, torch.Tensor] = {}
        self._counts = torch.zeros(len(self.layers), dtype=torch.float64)

    @contextmanager
    def watch(self) -> Iterator[None]:
        handles = []
        for number, (name, module) in enumerate(self._modules.items()):

            def look(module: nn.Module, inputs: tuple, number: int = number, name: str = name) -> None:
                self._add(number, name, inputs[0].detach().float())

            handles.append(module.register_forward_pre_hook(look))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        counts = sum_over_ranks(self._counts).tolist()
        numbers = {name: number for number, name in enumerate(self._modules)}
        self.moments = {name: moment / counts[numbers[name]] for name, moment in self.moments.items()}

    def saw(self, gradients: Gradients | None) -> None:
        """The hooks have seen it."""

    def _add(self, number: int, name: str, x: torch.Tensor) -> None:
        """x: (batch, tokens, in)."""
        routing = self._backbone.routing[name.partition(".")[0]]
        times = torch.ones(x.shape[:2], device=x.device)
        if routing.padding is not None and routing.padding.shape == x.shape[:2]:
            times = routing.padding.float()
            if routing.weights is not None:
                times = times * routing.weights[:, None]
        self._counts[number] += times.sum().double().cpu()
        weighted = (x * times[..., None]).flatten(0, 1)
        moment = sum_on_rank(weighted.T @ x.flatten(0, 1), owner(number))
        if rank() == owner(number):
            self.moments[name] = self.moments.get(name, 0) + moment


class FisherDiagonal:
    """The diagonal of the empirical Fisher, per trained number: the mean of squared gradients.

    Of whole micro batches over all ranks, because a contrastive loss has no gradient of one sample; so it depends on
    the batch size.
    """

    needs_gradients = True

    def __init__(self) -> None:
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
