"""Backbones: frozen vision-language models, and where adapters go in them."""

from r1p_dist.backbones.backbone import Backbone as Backbone
from r1p_dist.backbones.identity import weights_identity as weights_identity
from r1p_dist.backbones.llava import LlavaBackbone as LlavaBackbone
from r1p_dist.backbones.llava import load_llava as load_llava
from r1p_dist.backbones.open_clip import ClipBackbone as ClipBackbone
from r1p_dist.backbones.open_clip import attach_pool as attach_pool
from r1p_dist.backbones.open_clip import load_clip as load_clip
from r1p_dist.backbones.slots import Slot as Slot
from r1p_dist.backbones.weights import Placement as Placement
from r1p_dist.config import BackboneConfig


def load_backbone(config: BackboneConfig, placement: Placement | None = None, compiles: bool = False) -> Backbone:
    """Loads the backbone that a run's configuration names; placement, compiles and InputError as in `load_clip`."""
    if config.kind == "llava":
        return load_llava(
            config.name,
            gradient_checkpointing=config.gradient_checkpointing,
            feature_cache_gb=config.feature_cache_gb,
            placement=placement,
            compiles=compiles,
        )
    return load_clip(
        config.name,
        config.pretrained,
        force_quick_gelu=config.force_quick_gelu,
        gradient_checkpointing=config.gradient_checkpointing,
        placement=placement,
        compiles=compiles,
    )
