"""What the planner needs to know of a kind of backbone."""

from collections.abc import Mapping
from typing import Protocol

import torch

from r1p_dist.config import RunConfig
from r1p_dist.errors import InputError
from r1p_dist.kinds import kind_of
from r1p_dist.planner.model import Batch, ModelShape


class PlannerPart(Protocol):
    """What the part `planner` of a kind of backbone holds."""

    def micro_batch(self, samples: int, sizes: Mapping[str, int | None]) -> Batch:
        """Returns a rank's micro batch. sizes: by flag of `Kind.sizes`. InputError: a size out of bounds."""

    def describe(self, config: RunConfig, batch: Batch, dtype: torch.dtype) -> ModelShape:
        """Returns the shape of the model on the meta device, with the method's adapters.

        InputError: an unknown model, or a batch that it cannot read.
        """


def planner_part(kind: str) -> PlannerPart:
    """Returns the part of a kind of backbone."""
    return kind_of(kind).part("planner")


def check_size(flag: str, value: int, lowest: int, batch: int | None = None) -> int:
    """Returns a size. InputError: it is below the lowest, or above the batch."""
    if value < lowest or (batch is not None and value > batch):
        limit = f"from {lowest}" if batch is None else f"from {lowest} to --batch {batch}"
        raise InputError(f"{flag} {value}: must be {limit}")
    return value
