"""Backbones: frozen vision-language models, and where adapters go in them."""

from r1p_dist.backbones.identity import weights_identity as weights_identity
from r1p_dist.backbones.open_clip import ClipBackbone as ClipBackbone
from r1p_dist.backbones.open_clip import Slot as Slot
from r1p_dist.backbones.open_clip import attach as attach
from r1p_dist.backbones.open_clip import attach_pool as attach_pool
from r1p_dist.backbones.open_clip import load_clip as load_clip
from r1p_dist.backbones.weights import Placement as Placement
from r1p_dist.config import BackboneConfig


def load_backbone(config: BackboneConfig, placement: Placement | None = None) -> ClipBackbone:
    """Loads the backbone that a run's configuration names; placement and InputError as in `load_clip`."""
    return load_clip(
        config.name,
        config.pretrained,
        force_quick_gelu=config.force_quick_gelu,
        gradient_checkpointing=config.gradient_checkpointing,
        placement=placement,
    )
