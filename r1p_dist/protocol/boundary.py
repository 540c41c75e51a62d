"""What the planner must know of what a method does between two stages, beside leaving and merging its updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r1p_dist.protocol.trainer import Need


@dataclass(frozen=True)
class MomentPlan:
    """A second moment (width, columns) of as many rows as an input has: whole, or is_sketched by so many directions."""

    width: int
    columns: int
    is_sketched: bool

    @property
    def numel(self) -> int:
        return self.width * self.columns

    def flops(self, rows: int) -> int:
        """Returns the operations of its products: rows by rows, and where it is sketched rows by directions before."""
        return 2 * rows * self.numel * (2 if self.is_sketched else 1)


@dataclass(frozen=True)
class InputPlan:
    """Of one input that layers read, in the order in which ranks own them (`owner`); numbers are fp32.

    layer: the first that reads it. moments: those that the ranks sum on the owner for each micro batch of a scan, that
    of the input first. sent: the numbers of each tensor that it sends to all before the next stage, by
    `Trainer.by_layer`. left: of each tensor that it gives to `Method.memory`, by name.
    """

    layer: str
    moments: tuple[MomentPlan, ...]
    sent: tuple[int, ...]
    left: Mapping[str, int]


@dataclass(frozen=True)
class BoundaryPlan:
    """needs: of the one scan after a stage, as of a `Watcher`; None: there is none.

    batches: global batches that it shows; None: as many as an epoch has. inputs: all of which anything is measured.
    sums: bytes of each further sum over ranks. reads_weights: those of the adapted layers are read before a stage.
    """

    needs: Need | None = None
    batches: int | None = 0
    inputs: tuple[InputPlan, ...] = ()
    sums: tuple[int, ...] = ()
    reads_weights: bool = False
