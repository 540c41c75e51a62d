"""The planner on thousands of ranks is held against dry runs: payload exact, memory within a tenth."""

import json
from functools import partial
from pathlib import Path

import open_clip
import pytest

from r1p_dist.dry_run.ranks import set_ranks
from r1p_dist.planner.comparison import compare
from r1p_dist.recipes import load_config

ZERO = "deepspeed.overrides.zero_optimization"
# the usual bucket of 50 million numbers would hide all else of a small model
BUCKET = f"{ZERO}.reduce_bucket_size=500000"
FEW = "evaluation.batch_size=8"  # no plan is made of evaluations
# coming weights are gathered in several parts, and some of them again in the backward
TIGHT = [
    f"{ZERO}.stage3_prefetch_bucket_size=300000",
    f"{ZERO}.stage3_max_live_parameters=2000000",
    f"{ZERO}.stage3_max_reuse_distance=400000",
]


def check(ranks: int, *overrides: str) -> None:
    config = set_ranks(load_config("mini_mtil_dac", [BUCKET, FEW, *overrides]), ranks, 8)
    found = compare(config, ranks)
    assert found.run.ranks == ranks
    assert (found.step, found.boundary) == (found.real_step, found.real_boundary)
    memory = found.run.phases["step"].memory
    assert found.memory_ratio == pytest.approx(1, abs=0.1), (memory, found.memory)


campaign = partial(pytest.param, marks=pytest.mark.campaign)


@pytest.mark.parametrize("ranks, stage", [(8, 1), (4096, 2), campaign(64, 2), campaign(512, 0)])
def test_tiny_on_many_ranks(ranks: int, stage: int) -> None:
    check(ranks, f"deepspeed.config=zero{stage}", "options.vote=lagged")


@pytest.mark.parametrize("ranks, overrides", [(8, TIGHT), campaign(1, []), campaign(64, ["train.precision=bf16"])])
def test_tiny_sharded_on_many_ranks(ranks: int, overrides: list[str]) -> None:
    check(ranks, "deepspeed.config=zero3", *overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, overrides",
    [
        campaign(512, ["deepspeed.config=zero3", f"{ZERO}.stage3_prefetch_bucket_size=0"]),
        campaign(4096, ["deepspeed.config=zero1", "train.precision=bf16"]),
        campaign(64, ["deepspeed.config=zero3", "backbone.gradient_checkpointing=true", *TIGHT]),
        campaign(64, ["deepspeed.config=zero2", "train.gradient_accumulation_steps=2", "options.vote=local"]),
    ],
)
def test_more_settings(ranks: int, overrides: list[str]) -> None:
    check(ranks, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("name, stage, depth", [("ViT-bigG-14", 3, 1), campaign("ViT-B-16", 2, None)])
def test_big_widths(tmp_path: Path, name: str, stage: int, depth: int | None) -> None:
    config = open_clip.get_model_config(name)
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = depth or config[tower]["layers"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    overrides = [f'backbone={{"name": "local-dir:{tmp_path}"}}', f"deepspeed.config=zero{stage}"]
    run = set_ranks(load_config("mini_mtil_dac", [*overrides, FEW]), 64, 2)
    found = compare(run, 64)
    assert found.is_exact
    assert found.memory_ratio == pytest.approx(1, abs=0.1), (found.run.phases["step"].memory, found.memory)
