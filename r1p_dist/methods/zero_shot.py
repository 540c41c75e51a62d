"""The backbone as it is, for every task: the line that forgetting and transfer are measured from."""

from r1p_dist.adapters import LowRankLinear
from r1p_dist.methods.method import Method


class ZeroShot(Method):
    """Zero-shot: nothing is trained, every row of the matrix repeats the first."""

    def attach(self) -> list[LowRankLinear]:
        return []
