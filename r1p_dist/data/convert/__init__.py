"""Conversion of data sets into WebDataset shards: sources, the writer, and the check of what was written."""

from r1p_dist.data.convert.check import verify_shards as verify_shards
from r1p_dist.data.convert.sources import open_source as open_source
from r1p_dist.data.convert.writer import ConvertOptions as ConvertOptions
from r1p_dist.data.convert.writer import convert as convert
