"""Conversion of data sets into WebDataset shards: sources, the writer, and the check of what was written."""

from r1p_dist.lazy import lazy_exports

_EXPORTS = {
    "verify_shards": "r1p_dist.data.convert.check",
    "open_source": "r1p_dist.data.convert.sources",
    "ConvertOptions": "r1p_dist.data.convert.writer",
    "convert": "r1p_dist.data.convert.writer",
}

__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)
