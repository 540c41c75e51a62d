"""One LoRA on all tasks at once: the usual upper bound."""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1p_dist.protocol import LowRankMethod, Stage, joint_stage

if TYPE_CHECKING:
    from r1p_dist.data import Stream


class Joint(LowRankMethod):
    """Joint LoRA: all tasks at once, with as many iterations as they have together; the usual upper bound."""

    tiny = {"rank": 4}

    def stages(self, stream: Stream) -> list[Stage]:
        return [joint_stage("joint", super().stages(stream), stream)]
