"""What the backward computes again instead of keeping: an adapted linear's input, or a whole block."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from r1p_dist.adapters import FusedProjection, LowRankLinear


def set_recompute(layer: LowRankLinear | FusedProjection, module: nn.Module) -> None:
    """Tells an adapted linear which module computes its input."""
    object.__setattr__(layer, "recompute", module)  # not a child: the block holds it


def checkpoint_forward(block: nn.Module) -> None:
    """Makes a block run its forward again in the backward instead of keeping its activations."""
    # no determinism check: it compares shapes, and ZeRO-3 has freed small weights by then
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, determinism_check="none")
