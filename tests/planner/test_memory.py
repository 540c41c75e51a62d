"""The planner's memory is within a tenth of what a rank really takes, for a cut of ViT-B-32 on a CPU."""

import pytest

from r1p_dist.planner.memory import training_memory
from tests.planner.measured import measure_memory
from tests.planner.test_collectives import CHECKPOINTING, NO_PREFETCH, SHARD_ALL, describe

# ViT-B-32's widths with fewer blocks
SIZES = {
    "vision": {"image_size": 224, "patch_size": 32, "width": 768, "head_width": 64, "layers": 4},
    "text": {"width": 512, "heads": 8, "layers": 3},
    "embed_dim": 512,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, pictures, overrides",
    [
        (1, 16, ["deepspeed.config=zero0"]),
        (1, 24, ["deepspeed.config=zero1", CHECKPOINTING]),
        (1, 24, ["deepspeed.config=zero2", "train.precision=bf16"]),
        (2, 16, ["deepspeed.config=zero3", NO_PREFETCH, SHARD_ALL]),
    ],
)
def test_memory_is_within_a_tenth(run_distributed, monkeypatch, ranks: int, pictures: int, overrides: list) -> None:
    # freed memory must go back at once, or the peak is that of the allocator; a rank reads these when it starts
    for name, value in (("TRIM_THRESHOLD_", "1048576"), ("MMAP_THRESHOLD_", "524288"), ("ARENA_MAX", "1")):
        monkeypatch.setenv(f"MALLOC_{name}", value)
    overrides = [*overrides, f"train.global_batch_size={ranks * pictures}"]
    measured = max(run_distributed(measure_memory, ranks, SIZES, overrides))
    shape, zero, _, batch = describe(SIZES, overrides, ranks)
    predicted = training_memory(shape, zero, ranks, batch, touches_buffers=True)
    print(f"measured {measured / 1e6:.0f} MB, predicted {predicted.total / 1e6:.0f} MB: {predicted}")
    assert predicted.total == pytest.approx(measured, rel=0.1), predicted
