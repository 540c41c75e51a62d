"""The pristine weights of a CLIP, by the names of an open_clip model whose text tower is a module (`text.…`)."""

import torch
from torch import nn

from r1p_dist.backbones import Placement, load_clip, weights_identity
from r1p_dist.backbones.weights import draw
from r1p_dist.config import BackboneConfig
from r1p_dist.kinds.open_clip.weights import map_weights, weights_file

TEMPERATURE = ("logit_scale", "logit_bias")


class ClipWeights:
    """FrozenWeights of a model of open_clip; a temperature is a number (0-dim)."""

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

    def locate(self, weight: nn.Parameter, rows: slice | None) -> tuple[str, slice | None]:
        return self._names[weight], rows

    def read(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if self._mapped is not None:
            return self._mapped[name].reshape(shape)
        module, whole = self._owners[name]
        return draw(module, whole, torch.empty(shape))
