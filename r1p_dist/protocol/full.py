"""What methods share that train the backbone's own weights: which, and what a stage leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from r1p_dist.adapters import Dense, MergedWeight, Update
from r1p_dist.protocol.method import Method


class FullMethod(Method):
    """Every weight of the towers in `targets.towers` is trained; `targets.layers` does not matter.

    A CLIP's temperature stays as it is. A stage leaves all weights, in place of those before it.
    """

    def build(self) -> None:
        self._trained: dict[str, nn.Parameter] = {}
        self._weights: dict[str, MergedWeight] = {}
        for name, parameter in self.backbone.tower_parameters(self.config.targets.towers).items():
            parameter.requires_grad_(True)
            self._trained[name], self._weights[name] = parameter, MergedWeight(parameter)

    def prepare(self, index: int) -> None:
        for weight in self._weights.values():
            weight.keep_pristine()

    def updates(self) -> dict[str, Update]:
        return {name: Dense(parameter) for name, parameter in self._trained.items()}

    def deployed(self, count: int) -> list[int]:
        return super().deployed(count)[-1:]

    def set_merged(self, updates: Sequence[Mapping[str, Update]]) -> Sequence[Mapping[str, Update]]:
        for name, weight in self._weights.items():
            if updates or not weight.is_pristine:
                weight.set([task[name] for task in updates])
        return updates

    def update_places(self) -> dict[str, tuple[nn.Parameter, slice | None]]:
        return {name: (parameter, None) for name, parameter in self._trained.items()}
