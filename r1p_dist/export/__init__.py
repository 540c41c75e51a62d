"""Export of a run: its model as a folder for open_clip or transformers, its tasks' updates as adapters for PEFT.

The story is in `export_run`. One tensor at a time is read from the base model's file, merged, rounded and written, so a
model of any size needs the memory of a few of its tensors.
"""

from r1p_dist.lazy import lazy_exports

_EXPORTS = {
    "FORMATS": "r1p_dist.export.formats",
    "export_run": "r1p_dist.export.run",
}

__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)
