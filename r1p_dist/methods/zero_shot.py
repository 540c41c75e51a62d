"""The backbone as it is, for every task: the line that forgetting and transfer are measured from."""

from r1p_dist.protocol import Method


class ZeroShot(Method):
    """Zero-shot: nothing is trained, every row of the matrix repeats the first."""

    trains = False
