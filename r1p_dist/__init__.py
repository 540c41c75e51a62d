"""r1p_dist: teaches big vision-language models task after task with rank-1 expert pools, under ZeRO."""

from r1p_dist.lazy import lazy_exports

_EXPORTS = {
    "RunConfig": "r1p_dist.config",
    "Stream": "r1p_dist.data",
    "load_config": "r1p_dist.recipes",
    "attach_pool": "r1p_dist.backbones",
    "load_clip": "r1p_dist.backbones",
}

__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)
