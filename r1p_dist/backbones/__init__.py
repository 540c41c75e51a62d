"""Backbones: frozen vision-language models, and where adapters go in them."""

from r1p_dist.backbones.open_clip import ClipBackbone as ClipBackbone
from r1p_dist.backbones.open_clip import Slot as Slot
from r1p_dist.backbones.open_clip import attach as attach
from r1p_dist.backbones.open_clip import attach_pool as attach_pool
from r1p_dist.backbones.open_clip import load_clip as load_clip
