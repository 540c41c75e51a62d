"""r1p_dist: teaches big vision-language models task after task with rank-1 expert pools, under ZeRO."""

from typing import TYPE_CHECKING

from r1p_dist.lazy import lazy_exports

if TYPE_CHECKING:  # for editors; each is imported when it is first asked for
    from r1p_dist.attached_pool import AttachedPool as AttachedPool
    from r1p_dist.attached_pool import attach_pool as attach_pool
    from r1p_dist.config import RunConfig as RunConfig
    from r1p_dist.data import Stream as Stream
    from r1p_dist.errors import InputError as InputError
    from r1p_dist.kinds.llava.backbone import load_llava as load_llava
    from r1p_dist.kinds.open_clip.backbone import load_clip as load_clip
    from r1p_dist.recipes import load_config as load_config

_EXPORTS = {
    "AttachedPool": "r1p_dist.attached_pool",
    "InputError": "r1p_dist.errors",
    "RunConfig": "r1p_dist.config",
    "Stream": "r1p_dist.data",
    "attach_pool": "r1p_dist.attached_pool",
    "load_clip": "r1p_dist.backbones",
    "load_config": "r1p_dist.recipes",
    "load_llava": "r1p_dist.backbones",
}

__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return __all__
