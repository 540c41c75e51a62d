"""The optimizer of every method: AdamW that keeps what a loss or gradient that is not finite would spoil."""

from collections.abc import Callable

import torch
from torch import nn

from r1p_dist.config import TrainConfig


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that asks before each update, on the device: the host need not know the answer to go on.

    guard: takes whether this rank's gradients are finite, a bool (), and returns 1.0 where the update must not be made
    on any rank, else 0.0, fp32 (). Values, moments and the number of updates then stay as they are. None asks nobody.
    """

    guard: Callable[[torch.Tensor], torch.Tensor] | None = None

    def step(self, closure: None = None) -> None:
        if self.guard is not None:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            largest = nn.utils.get_total_norm(gradients, norm_type=torch.inf)
            self.found_inf = self.guard(largest.isfinite())  # the fused kernels' own switch, as GradScaler sets it
        super().step(closure)


def make_optimizer(parameters: list[nn.Parameter], train: TrainConfig) -> GuardedAdamW:
    """Returns the optimizer of one task."""
    return GuardedAdamW(parameters, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True)
