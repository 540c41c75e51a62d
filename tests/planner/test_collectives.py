"""The planner's collectives are exactly those of the real engine: kinds, bytes with padding, and counts of one step.

The planner was written against other configurations than these.
"""

from collections import Counter

import pytest
import torch

from r1p_dist.config import RunConfig
from r1p_dist.engine import resolve_deepspeed
from r1p_dist.planner.communication import boundary_collectives, step_collectives
from r1p_dist.planner.model import Batch, ModelShape, describe_backbone
from r1p_dist.planner.zero import Zero
from tests.planner.measured import PROMPTS, make_backbone, measure_boundaries, measure_steps

ZERO = "deepspeed.overrides.zero_optimization"
NO_PREFETCH = f"{ZERO}.stage3_prefetch_bucket_size=0"
SHARD_ALL = f"{ZERO}.stage3_param_persistence_threshold=0"
CHECKPOINTING = "backbone.gradient_checkpointing=true"
# deeper and shallower towers, widths that nothing divides into, other ranks of the pool
SIZES = {
    "vision": {"layers": 3, "width": 40, "head_width": 20},
    "text": {"layers": 1, "width": 28, "heads": 4},
    "embed_dim": 22,
}
POOL = ["pool.rank=7", "pool.active=5", "pool.merged=3"]


def case(stage: int, *overrides: str, sizes: dict = SIZES, batch: int = 24) -> tuple[dict, list[str]]:
    own = [f"deepspeed.config=zero{stage}", f"train.global_batch_size={batch}", *POOL]
    return sizes, [*own, *([NO_PREFETCH] if stage == 3 else []), *overrides]


CASES = [case(stage, f"pool.vote={vote}") for stage in (0, 1, 2, 3) for vote in ("global", "lagged", "local")] + [
    case(3, SHARD_ALL),
    case(3, f"{ZERO}.stage3_param_persistence_threshold=300", "train.precision=bf16"),
    case(0, "train.precision=bf16", "train.gradient_accumulation_steps=3", "train.gradient_clipping=0.5"),
    case(1, "train.precision=bf16", "train.gradient_accumulation_steps=3", CHECKPOINTING),
    case(2, "train.precision=bf16", "train.gradient_accumulation_steps=3", "pool.vote=lagged"),
    case(3, "train.precision=bf16", "train.gradient_accumulation_steps=3", SHARD_ALL, CHECKPOINTING),
    case(3, SHARD_ALL, f"{ZERO}.stage3_max_reuse_distance=9000", "targets.layers=[q, v, fc1]"),
    case(3, SHARD_ALL, f"{ZERO}.stage3_max_reuse_distance=9000", CHECKPOINTING, "targets.towers=[image]"),
    case(1, f"{ZERO}.reduce_bucket_size=2000", "targets.towers=[text]"),
    case(1, f"{ZERO}.reduce_bucket_size=2000", f"{ZERO}.overlap_comm=true", "train.gradient_accumulation_steps=2"),
    case(2, f"{ZERO}.reduce_bucket_size=1500", "train.gradient_accumulation_steps=2", CHECKPOINTING),
    case(2, "pool.router_grad=gated", CHECKPOINTING),
    case(3, f"{ZERO}.reduce_bucket_size=2000"),
    case(3, "pool.router_grad=straight_through", "pool.vote=lagged"),
    case(3, "method=lora", "lora.rank=3", SHARD_ALL, sizes={}, batch=12),
    case(2, "method=lora", "lora.rank=3", "train.precision=bf16", sizes={}, batch=12),
]


def describe(sizes: dict, overrides: list[str], ranks: int) -> tuple[ModelShape, Zero, RunConfig, Batch]:
    config = RunConfig.load("mini_mtil", overrides)
    pictures = config.train.global_batch_size // config.train.gradient_accumulation_steps // ranks
    batch = Batch(pictures, min(pictures, len(PROMPTS)), 10)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    shape = describe_backbone(config, make_backbone(sizes, "meta"), batch, dtype)
    return shape, Zero.of(resolve_deepspeed(config, ranks)), config, batch


def counted(collectives: Counter) -> Counter:
    found: Counter = Counter()
    for collective, calls in collectives.items():
        found[collective.kind, collective.bytes] += calls
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks, cases", [(2, CASES), (1, CASES[::5]), (4, CASES[5::6])])
def test_step_is_predicted_exactly(run_distributed, ranks: int, cases: list) -> None:
    measured = run_distributed(measure_steps, ranks, cases, timeout_s=300)
    for i, (sizes, overrides) in enumerate(cases):
        shape, zero, config, batch = describe(sizes, overrides, ranks)
        micro_steps = config.train.gradient_accumulation_steps
        predicted = counted(step_collectives(shape, zero, ranks, micro_steps, batch))
        for result in measured:
            real = Counter({(kind, size): calls for kind, size, calls in result[i]})
            assert real == predicted, (overrides, "only real", real - predicted, "only predicted", predicted - real)
        assert ranks == 1 or predicted.total() > 5


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_task_boundary_is_predicted_exactly(run_distributed, ranks: int) -> None:
    cases = [case(1), case(2, "train.precision=bf16"), case(3), case(3, SHARD_ALL)]
    measured = run_distributed(measure_boundaries, ranks, cases, timeout_s=120)
    for i, (sizes, overrides) in enumerate(cases):
        shape, zero, _, _ = describe(sizes, overrides, ranks)
        predicted = counted(boundary_collectives(shape, zero, ranks))
        for result in measured:
            real = Counter({(kind, size): calls for kind, size, calls in result[i]})
            assert real == predicted, (overrides, "only real", real - predicted, "only predicted", predicted - real)
