"""The pristine weights of a CLIP, by the names of an open_clip model whose text tower is a module (`text.…`)."""

import re

import torch
from torch import nn

from r1p_dist.backbones import Placement, load_clip, weights_identity
from r1p_dist.backbones.weights import draw
from r1p_dist.config import BackboneConfig
from r1p_dist.kinds.open_clip.weights import map_weights, weights_file

TEMPERATURE = ("logit_scale", "logit_bias")


class ClipWeights:
    """FrozenWeights of a model of open_clip; a temperature is a number (0-dim).

    kept_types: of what keeps its precision in an export, by name: temperatures, which scale every logit, and statistics
    of normalisation.
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
                name = _plain_name(whole)
                self._owners[name] = module, whole
                self._names[parameter] = name
                self.shapes[name] = torch.Size() if name in TEMPERATURE else parameter.shape
        in_files = self.backbone.state_dict()
        buffers = self.backbone.named_buffers()
        self._buffers = {_plain_name(name): buffer for name, buffer in buffers if name in in_files}
        self.shapes |= {name: buffer.shape for name, buffer in self._buffers.items()}
        self.kept_types = dict.fromkeys(TEMPERATURE, torch.float32)
        self.kept_types |= {name: buffer.dtype for name, buffer in self._buffers.items()}

    def locate(self, weight: nn.Parameter, rows: slice | None) -> tuple[str, slice | None]:
        return self._names[weight], rows

    def read(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if self._mapped is not None:
            return self._mapped[name].reshape(shape)
        if name in self._buffers:
            return self._buffers[name]
        module, whole = self._owners[name]
        return draw(module, whole, torch.empty(shape))


def _plain_name(name: str) -> str:
    """Returns open_clip's name of a weight of the backbone, which holds a fused projection as a module."""
    name = name.removeprefix("model.").replace(".attn.in_proj.linear.", ".attn.in_proj_")
    return re.sub(r"\.qkv\.(?:(linear\.)|(?=[qv]_bias$))", lambda found: ".qkv." if found[1] else ".", name)
