"""The time of a step: a prediction from floating-point operations and collectives, never measured at these sizes.

Assumptions, all of which can be set: products run at `utilisation` of the accelerator's dense peak; collectives that
DeepSpeed can run beside the computation hide behind at most OVERLAP of it; all others add their full time; data are
always there in time; no rank is slower than the others.
"""

from dataclasses import dataclass

import torch

from r1p_dist.planner.accelerators import Accelerator
from r1p_dist.planner.model import ModelShape
from r1p_dist.planner.network import Collectives, Network, cost
from r1p_dist.planner.zero import Zero

OVERLAP = 0.8


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. exposed: what its collectives add; communication: all of them, hidden or not."""

    compute: float
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        """The share of a step that is not spent on waiting for collectives."""
        return self.compute / self.total


def step_seconds(shape: ModelShape, accelerator: Accelerator) -> float:
    """Returns the seconds of a micro step's products at the accelerator's peak."""
    return (shape.trace.forward_flops + shape.trace.backward_flops) / _peak(shape, accelerator)


def scan_seconds(shape: ModelShape, accelerator: Accelerator) -> float:
    """Returns those of a micro batch that is scanned after a task; second moments are fp32 products."""
    return shape.scan_flops / _peak(shape, accelerator) + shape.moment_flops / accelerator.fp32


def _peak(shape: ModelShape, accelerator: Accelerator) -> float:
    return accelerator.bf16 if shape.dtype == torch.bfloat16 else accelerator.fp32


def batch_time(compute: float, zero: Zero, collectives: Collectives, ranks: int, network: Network) -> StepTime:
    """Returns the predicted time of a global batch, trained or scanned. compute: the seconds of its products."""
    hidden = set()
    if zero.prefetch_bucket_size:
        hidden.add("weights")
    if zero.overlap_comm:
        hidden.add("gradients")
    beside = waiting = 0.0
    for collective, count in collectives.items():
        seconds = count * cost(collective, ranks, network).seconds
        if collective.purpose in hidden:
            beside += seconds
        else:
            waiting += seconds
    return StepTime(compute, beside + waiting, waiting + max(0.0, beside - OVERLAP * compute))


def boundary_time(collectives: Collectives, ranks: int, network: Network) -> float:
    """Returns the seconds of the collectives between two tasks."""
    return sum(count * cost(collective, ranks, network).seconds for collective, count in collectives.items())
