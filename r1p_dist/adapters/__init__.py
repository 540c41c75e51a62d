"""Adapters: frozen linears with a trainable low-rank update that is merged into the weight."""

from r1p_dist.adapters.gated import GatedLinear as GatedLinear
from r1p_dist.adapters.gated import shrink as shrink
from r1p_dist.adapters.lora import LoRALinear as LoRALinear
from r1p_dist.adapters.low_rank import FusedProjection as FusedProjection
from r1p_dist.adapters.low_rank import LayerPlan as LayerPlan
from r1p_dist.adapters.low_rank import LowRankLinear as LowRankLinear
from r1p_dist.adapters.low_rank import recorded as recorded
from r1p_dist.adapters.low_rank import take_penalties as take_penalties
from r1p_dist.adapters.merged_weight import Dense as Dense
from r1p_dist.adapters.merged_weight import Factors as Factors
from r1p_dist.adapters.merged_weight import MergedWeight as MergedWeight
from r1p_dist.adapters.merged_weight import Update as Update
from r1p_dist.adapters.pool import AdaptedLinear as AdaptedLinear
from r1p_dist.adapters.pool import Routing as Routing
