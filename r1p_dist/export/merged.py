"""A model's weights, read one at a time: from the base model's files, plus what tasks merged."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from r1p_dist.adapters import Dense, Update
from r1p_dist.backbones import Backbone


class FrozenWeights(Protocol):
    """The pristine weights of a backbone, without a model that holds them.

    backbone: the model on the meta device, for its shapes and settings. identity: as in checkpoints. shapes: by name.
    """

    backbone: Backbone
    identity: dict[str, str | None]
    shapes: Mapping[str, torch.Size]

    def locate(self, weight: nn.Parameter, rows: slice | None) -> tuple[str, slice | None]:
        """Returns the name of a weight of `backbone`, and which of its rows a layer serves; None: all."""

    def read(self, name: str) -> torch.Tensor:
        """Returns a weight; it may be mapped from the file, so it must not be written to."""


class MergedWeights:
    """The weights of the model with some updates: W_0 + sum of scaling * B A, in fp32, computed when they are read; a
    dense update is in place of W_0.

    places: of each layer that was trained, the name of its weight and its rows. updates: per task, those by layer.
    """

    def __init__(
        self,
        base: FrozenWeights,
        places: Mapping[str, tuple[str, slice | None]],
        updates: Sequence[Mapping[str, Update]],
    ):
        self._base = base
        self.shapes = base.shapes
        self._layers: dict[str, list[tuple[slice | None, list[Update]]]] = {}
        for layer, (name, rows) in places.items() if updates else ():
            self._layers.setdefault(name, []).append((rows, [update[layer] for update in updates]))

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Returns a weight in fp32; rows: only these of an attention's fused projection, its q, k or v."""
        weight = self._base.read(name)
        weight = weight if rows is None else weight[rows]
        layers = [(own, updates) for own, updates in self._layers.get(name, ()) if own is None or rows in (None, own)]
        if not layers:
            return weight.to(torch.float32)
        weight = weight.to(torch.float32, copy=True)
        for own, updates in layers:
            if isinstance(updates[-1], Dense):
                value = updates[-1].value
                weight.copy_(value if rows is None else value[rows])
                continue
            served = weight if rows is not None else weight[own]
            B = torch.cat([update.scaling * update.B.float() for update in updates], dim=1)  # (rows, k of all)
            served += B @ torch.cat([update.A.float() for update in updates])
        return weight
