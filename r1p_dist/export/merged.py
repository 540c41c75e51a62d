"""A model's weights, read one at a time: from the base model's file, plus what tasks merged.

Names are those of an open_clip model whose text tower is a module (`text.…`).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from r1p_dist.adapters import Factors, LowRankLinear
from r1p_dist.backbones import Placement, load_clip, weights_identity
from r1p_dist.backbones.weights import draw, map_weights, weights_file
from r1p_dist.config import BackboneConfig

TEMPERATURE = ("logit_scale", "logit_bias")


class FrozenWeights:
    """The pristine weights of a backbone, without a model that holds them.

    backbone: the model on the meta device, for its shapes and settings. identity: as in checkpoints. shapes: by name;
    a temperature is a number (0-dim).
    """

    def __init__(self, config: BackboneConfig):
        """InputError: as `load_clip`."""
        self.backbone = load_clip(
            config.name,
            config.pretrained,
            force_quick_gelu=config.force_quick_gelu,
            placement=Placement(torch.device("meta")),
        )
        self.identity = weights_identity(config, self.backbone)
        file = weights_file(config.name, config.pretrained)
        self._mapped = None if file is None else map_weights(file, self.backbone.model)
        self._owners: dict[str, tuple[nn.Module, str]] = {}  # whose weight it is, and its name in the backbone
        self._names: dict[nn.Parameter, str] = {}
        self.shapes: dict[str, torch.Size] = {}
        for prefix, module in self.backbone.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                whole = f"{prefix}.{own}"
                # blocks open to adapters hold the fused projection as a linear
                name = whole.removeprefix("model.").replace(".attn.in_proj.linear.", ".attn.in_proj_")
                self._owners[name] = module, whole
                self._names[parameter] = name
                self.shapes[name] = torch.Size() if name in TEMPERATURE else parameter.shape

    def locate(self, adapter: LowRankLinear) -> tuple[str, slice]:
        """Returns the name of the weight that an adapter on `backbone` serves, and its rows."""
        return self._names[adapter.linear.weight], adapter.rows

    def read(self, name: str) -> torch.Tensor:
        """Returns a weight; it may be mapped from the file, so it must not be written to."""
        shape = self.shapes[name]
        if self._mapped is not None:
            return self._mapped[name].reshape(shape)
        module, whole = self._owners[name]
        return draw(module, whole, torch.empty(shape))


class MergedWeights:
    """The weights of the model with some updates: W_0 + sum of scaling * B A, in fp32, computed when they are read.

    places: of each adapted layer, the name of its weight and its rows. updates: per task, the factors by layer.
    """

    def __init__(
        self,
        base: FrozenWeights,
        places: Mapping[str, tuple[str, slice]],
        updates: Sequence[Mapping[str, Factors]],
    ):
        self._base = base
        self.shapes = base.shapes
        self._layers: dict[str, list[tuple[slice, list[Factors]]]] = {}
        for layer, (name, rows) in places.items() if updates else ():
            self._layers.setdefault(name, []).append((rows, [update[layer] for update in updates]))

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Returns a weight in fp32; rows: only these of an attention's fused projection, its q, k or v."""
        weight = self._base.read(name)
        weight = weight if rows is None else weight[rows]
        layers = [(own, updates) for own, updates in self._layers.get(name, ()) if rows in (None, own)]
        if not layers:
            return weight.to(torch.float32)
        weight = weight.to(torch.float32, copy=True)
        for own, updates in layers:
            served = weight if rows is not None else weight[own]
            B = torch.cat([update.scaling * update.B.float() for update in updates], dim=1)  # (rows, k of all)
            served += B @ torch.cat([update.A.float() for update in updates])
        return weight
