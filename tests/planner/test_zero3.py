"""What ZeRO-3 holds whole at each moment of a step, counted by hand."""

import pytest
import torch

from r1p_dist.kinds.open_clip.planner import Pictures, build_clip, describe_clip
from r1p_dist.planner.trace import Parameter, Trace, Visit
from r1p_dist.planner.zero import Zero
from r1p_dist.planner.zero3 import Coordinator
from r1p_dist.recipes import load_config

RANKS = 4
# modules: a root without parameters, one with a weight and a bias, one with a weight alone
NUMEL, OWNERS = [10, 6, 21], [[], [0, 1], [2]]


def coordinator(prefetch: int) -> Coordinator:
    """A forward alone; nothing is persistent, nor kept for its next use."""
    order = [(0, True), (1, True), (1, False), (2, True), (2, False), (0, False)]
    visits = [Visit(module, is_fetch, False, False, 0, 0) for module, is_fetch in order]
    own = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    own |= {"stage": 3, "stage3_prefetch_bucket_size": prefetch}
    zero = Zero.of({"zero_optimization": own, "gradient_clipping": 0, "bf16": {"enabled": False}})
    return Coordinator(Trace([Parameter(f"p{n}", (n,), "frozen") for n in NUMEL], OWNERS, visits), zero, RANKS)


# Parts of 3, 2 and 6 numbers: buffers of 12, 8 and 24. What is gathered alone keeps its buffer, others are copied.
TOGETHER, COPIES, ALONE = 12 + 8, 10 + 6, 24
ALL = TOGETHER + ALONE


@pytest.mark.parametrize(
    "prefetch, most, after",
    [
        (0, [0, TOGETHER + COPIES, 0, ALONE, 0, 0], [0, COPIES, 0, ALONE, 0, 0]),
        # the root's visit gathers the first two, the next one the third ahead of its use
        (
            COPIES,
            [TOGETHER, COPIES + ALONE, ALONE, ALONE, 0, 0],
            [TOGETHER, COPIES + ALONE, ALONE, ALONE, 0, 0],
        ),
        # all three together: the buffer stays until the last was used
        (
            99,
            [ALL, ALL + sum(NUMEL), ALL + 21, ALL + 21, 0, 0],
            [ALL, ALL + sum(NUMEL), ALL + 21, 21, 0, 0],
        ),
    ],
)
def test_whole_weights_at_each_visit(prefetch: int, most: list[int], after: list[int]) -> None:
    moves = list(coordinator(prefetch).run())
    assert [move.most for move in moves] == most
    assert [move.after for move in moves] == after


def test_persistent_weights_are_held_with_their_padding() -> None:
    own = {"stage": 3, "stage3_param_persistence_threshold": 10}
    zero = Zero.of({"zero_optimization": own, "gradient_clipping": 0, "bf16": {"enabled": False}})
    trace = Trace([Parameter(f"p{n}", (n,), "frozen") for n in NUMEL], OWNERS)
    assert Coordinator(trace, zero, RANKS).held == 12 + 8


def test_the_backbone_itself_is_entered_first_and_left_last() -> None:
    config = load_config("mini_mtil_dac", [])
    shape = describe_clip(config, build_clip(config.backbone), Pictures(2, 2, 8), torch.float32)
    forward = [visit for visit in shape.trace.visits if not visit.is_backward]
    assert (forward[0].module, forward[0].is_fetch) == (0, True)
    assert (forward[-1].module, forward[-1].is_fetch) == (0, False)
