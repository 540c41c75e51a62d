"""Conversion of data sets into WebDataset shards: sources, the writer, and the check of what was written."""

from r1p_dist.lazy import lazy_exports

_EXPORTS = {
    "verify_shards": "r1p_dist.data.convert.check",
    "ConvertOptions": "r1p_dist.data.convert.shard_writer",
    "open_source": "r1p_dist.data.convert.sources",
    "open_splits": "r1p_dist.data.convert.sources",
    "convert": "r1p_dist.data.convert.writer",
}

__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)
