"""The backbone that a run's configuration names; the libraries of the other kind are not imported."""

from r1p_dist.backbones.backbone import Backbone
from r1p_dist.backbones.weights import Placement
from r1p_dist.config import BackboneConfig


def load_backbone(config: BackboneConfig, placement: Placement | None = None, compiles: bool = False) -> Backbone:
    """Loads the backbone that a run's configuration names; placement, compiles and InputError as in `load_clip`."""
    if config.kind == "llava":
        from r1p_dist.backbones.llava import load_llava

        return load_llava(
            config.name,
            gradient_checkpointing=config.gradient_checkpointing,
            feature_cache_gb=config.feature_cache_gb,
            placement=placement,
            compiles=compiles,
        )
    from r1p_dist.backbones.open_clip import load_clip

    return load_clip(
        config.name,
        config.pretrained,
        force_quick_gelu=config.force_quick_gelu,
        gradient_checkpointing=config.gradient_checkpointing,
        placement=placement,
        compiles=compiles,
    )
