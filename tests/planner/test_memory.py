"""The planner's memory is within a tenth of what a rank really takes, for cuts of ViT-B-32 and LLaVA on a CPU."""

from functools import partial

import pytest

from r1p_dist.kinds.llava import token_losses
from r1p_dist.planner.memory import training_memory
from r1p_dist.planner.trace import Trace
from tests.planner.measured import measure_memory
from tests.planner.test_collectives import CHECKPOINTING, NO_PREFETCH, SHARD_ALL, describe

# ViT-B-32's widths with fewer blocks
SIZES = {
    "vision": {"image_size": 224, "patch_size": 32, "width": 768, "head_width": 64, "layers": 4},
    "text": {"width": 512, "heads": 8, "layers": 3},
    "embed_dim": 512,
}


# a quarter of llava-1.5-7b's widths
LLAVA_SIZES = {
    "vision": {"image_size": 112, "patch_size": 14, "hidden_size": 256, "intermediate_size": 1024},
    "text": {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 8, "num_key_value_heads": 8},
    "tokens": (128, 16),
}
PACKED_SIZES = LLAVA_SIZES | {"tokens": (256, 16), "mean_tokens": 176}
campaign = partial(pytest.param, marks=pytest.mark.campaign)
LLAVA = ["backbone.kind=llava", "backbone.feature_cache_gb=0"]


def test_logits_are_planned_by_chunks(monkeypatch) -> None:
    vocabulary, samples, answers = 50_000, 4, 48
    sizes = {"text": {"vocab_size": vocabulary}, "tokens": (64, answers)}
    monkeypatch.setattr(token_losses, "CHUNK_LOGITS", 6 * vocabulary)
    shape, _, _ = describe(sizes, [*LLAVA, f"train.global_batch_size={samples}"], 1)
    assert shape.trace.peak < samples * answers * vocabulary * 4 / 2


@pytest.mark.parametrize("checkpointing", [[], [CHECKPOINTING]])
def test_a_packed_row_costs_what_its_conversations_cost_by_themselves(checkpointing: list[str]) -> None:
    def traced(samples: int, overrides: list[str], **sizes) -> Trace:
        own = [*LLAVA, *checkpointing, f"train.global_batch_size={samples}", *overrides]
        return describe({"text": LLAVA_SIZES["text"], **sizes}, own, 1)[0].trace

    packed = traced(3, ["data.packing=true"], tokens=(90, 7), mean_tokens=60)
    padded = traced(3, [], tokens=(90, 7))
    alone = [traced(1, [], tokens=(tokens, 7)) for tokens in (90, 45, 45)]
    for kind in ("forward_flops", "backward_flops"):
        expected = sum(getattr(trace, kind) for trace in alone)
        assert getattr(packed, kind) == expected < 0.75 * getattr(padded, kind)
    assert packed.peak < 0.8 * padded.peak


def test_what_steady_knows_of_past_inputs_is_counted_once_for_each() -> None:
    shape, zero, _ = describe(SIZES, ["method=steady", "options.sketch=16", "train.global_batch_size=16"], 2)
    # of each block the inputs of q, k and v together, of the attention's output, and of both linears of the MLP
    widths = 4 * [768, 768, 768, 4 * 768] + 3 * [512, 512, 512, 4 * 512]
    roots = [(16 if width > 2048 else width) * width for width in widths]
    memory = training_memory(shape, zero, 2, touches_buffers=True)
    assert memory.method == 4 * sum(roots)
    plain, _, _ = describe(SIZES, ["method=lora", "train.global_batch_size=16"], 2)
    lora = training_memory(plain, zero, 2, touches_buffers=True)
    assert lora.method == 0
    # R lies nowhere else: beside the activations are A R, what its gradient needs and the penalty of each layer
    assert 0 < memory.activations - lora.activations < 0.1 * memory.method


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, cases",
    [
        (
            2,
            [
                (SIZES, 16, ["deepspeed.config=zero3", NO_PREFETCH, SHARD_ALL]),
                (LLAVA_SIZES, 2, ["deepspeed.config=zero3", NO_PREFETCH, SHARD_ALL, CHECKPOINTING, *LLAVA]),
                (PACKED_SIZES, 4, ["deepspeed.config=zero2", "data.packing=true", *LLAVA]),
            ],
        ),
        campaign(1, [(SIZES, 4, ["deepspeed.config=zero2", "train.precision=bf16"])]),
        campaign(1, [(SIZES, 16, ["deepspeed.config=zero0"])]),
        campaign(1, [(SIZES, 24, ["deepspeed.config=zero1", CHECKPOINTING])]),
        campaign(1, [(LLAVA_SIZES, 2, ["deepspeed.config=zero2", "train.precision=bf16", *LLAVA])]),
    ],
)
def test_memory_is_within_a_tenth(
    run_distributed, monkeypatch, ranks: int, cases: list[tuple[dict, int, list[str]]]
) -> None:
    # freed memory must go back at once, or the peak is that of the allocator; a rank reads these when it starts
    for name, value in (("TRIM_THRESHOLD_", "1048576"), ("MMAP_THRESHOLD_", "524288"), ("ARENA_MAX", "1")):
        monkeypatch.setenv(f"MALLOC_{name}", value)
    runs = [(sizes, [*overrides, f"train.global_batch_size={ranks * samples}"]) for sizes, samples, overrides in cases]
    found = run_distributed(measure_memory, ranks, runs, timeout_s=1100, new_interpreter=True)
    for (sizes, overrides), measured in zip(runs, map(max, zip(*found, strict=True)), strict=True):
        shape, zero, _ = describe(sizes, overrides, ranks)
        predicted = training_memory(shape, zero, ranks, touches_buffers=True)
        print(f"measured {measured / 1e6:.0f} MB, predicted {predicted.total / 1e6:.0f} MB: {predicted}")
        assert predicted.total == pytest.approx(measured, rel=0.1), (overrides, predicted)
