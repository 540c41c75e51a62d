"""r1p_dist: teaches big vision-language models task after task with rank-1 expert pools, under ZeRO."""

import importlib
from typing import Any

_EXPORTS = {
    "RunConfig": "r1p_dist.config",
    "Stream": "r1p_dist.data",
    "attach_pool": "r1p_dist.backbones",
    "load_clip": "r1p_dist.backbones",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    # lazy: `import r1p_dist` and the command line's --help need no torch
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
