"""Backbones: frozen vision-language models, and where adapters go in them."""

from r1p_dist.lazy import lazy_exports

_EXPORTS = {
    "Backbone": "r1p_dist.backbones.backbone",
    "weights_identity": "r1p_dist.backbones.identity",
    "LlavaBackbone": "r1p_dist.kinds.llava.backbone",
    "load_llava": "r1p_dist.kinds.llava.backbone",
    "load_backbone": "r1p_dist.backbones.load",
    "ClipBackbone": "r1p_dist.kinds.open_clip.backbone",
    "load_clip": "r1p_dist.kinds.open_clip.backbone",
    "Slot": "r1p_dist.backbones.slots",
    "Placement": "r1p_dist.backbones.weights",
}

__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)
