"""Adapted linears: a frozen layer plus a trainable low-rank update that merges into it."""

from r1p_dist.adapters.lora import LoRALinear as LoRALinear
from r1p_dist.adapters.low_rank import Factors as Factors
from r1p_dist.adapters.low_rank import FusedProjection as FusedProjection
from r1p_dist.adapters.low_rank import LowRankLinear as LowRankLinear
from r1p_dist.adapters.pool import AdaptedLinear as AdaptedLinear
from r1p_dist.adapters.pool import Routing as Routing
