"""Two ranks equal one rank for towers of every make and the sigmoid loss, at ZeRO 2 and 3 (DESIGN.md 5.1).

What does not depend on the make of a tower, past tasks and AGO for example, is in test_parity.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from r1p_dist.adapters.low_rank import full_values
from r1p_dist.backbones.weights import place
from r1p_dist.distributed import rank, sum_over_ranks, world_size
from r1p_dist.engine import start_process_group, weights_placement
from r1p_dist.methods import make_method
from r1p_dist.recipes import load_config
from tests.small_towers import FAMILIES, make_backbone, pictures
from tests.stages import Stages

PROMPTS = ["cat", "tall tree", "sea", "a red flag"]
LABELS = torch.tensor([0, 0, 1, 0, 2, 3, 1, 0])
# all of them at ZeRO-3, where modules must be called as such; the sums of ZeRO-2 know nothing of towers
CASES = [*((family, 3) for family in FAMILIES), ("siglip", 2), ("roberta", 2)]


def train(family: str, folder: str, stage: int) -> dict[str, Any]:
    """A task of two steps, with the weights sharded from the start where the stage does so."""
    config = load_config(
        "mini_mtil_dac",
        [
            *("train.global_batch_size=8", "train.iterations=2", "train.lr=1e-2", "train.precision=fp32"),
            *("options.rank=6", "options.active=3", "options.merged=2", "options.alpha=6.0"),
            *("options.guide.image=auto", "options.guide.text=auto", f"deepspeed.config=zero{stage}"),
            *(["deepspeed.overrides.zero_optimization.stage3_param_persistence_threshold=0"] if stage == 3 else []),
        ],
    )
    backbone = make_backbone(family, Path(folder) / f"{rank()}-{world_size()}")
    if stage == 3:
        place(backbone, weights_placement(config, start_process_group()))
    if stage == 3 and family in ("siglip", "roberta"):
        backbone.checkpoint_blocks()
    method = make_method(config, backbone)
    prepare, stages = backbone.preparer(PROMPTS), Stages(method, config)
    losses = []
    stages.begin(0)
    for step in range(2):
        image = pictures(family, 8, seed=step) + 2 * LABELS[:, None, None, None]
        mine = {"image": image.chunk(world_size())[rank()], "label": LABELS.chunk(world_size())[rank()]}
        loss, _ = method.loss(stages.engine, prepare(mine))
        losses.append(sum_over_ranks(loss.detach().clone()) / world_size())
        assert stages.engine.step(loss)
        method.after_step(stages.trainer)
    counts = torch.stack([adapter.activation_counts for adapter in method.adapters]).clone()
    stages.end()
    backbone.eval()
    with torch.no_grad():  # by way of the engine, as an evaluation of the merged weights does it
        features = torch.cat(stages.engine(pictures(family, 2), backbone.tokenize(PROMPTS)))
    stages.engine.close()
    return {
        "loss": torch.stack(losses),
        "counts": counts,
        "delta": torch.cat([adapter.merged_delta().flatten() for adapter in method.adapters]),
        "weights": torch.cat([v.flatten() for a in method.adapters for v in full_values(a.linear.weight)]),
        "features": features,
    }


def run_cases(rank: int, world_size: int, folder: str, cases: list[tuple[str, int]]) -> list[dict[str, Any]]:
    return [train(family, folder, stage) for family, stage in cases]


@pytest.mark.slow
def test_two_ranks_equal_one(run_distributed, tmp_path: Path) -> None:
    plain = [(family, 0) for family in FAMILIES]
    references = dict(zip(FAMILIES, run_distributed(run_cases, 1, str(tmp_path), plain)[0], strict=True))
    for case, result in zip(CASES, run_distributed(run_cases, 2, str(tmp_path), CASES)[0], strict=True):
        reference = references[case[0]]
        assert torch.equal(result["counts"], reference["counts"]), case
        assert reference["delta"].norm() > 1e-3 and reference["loss"].std() > 0, case
        for name, bound in (("loss", 1e-5), ("delta", 1e-3), ("weights", 1e-4), ("features", 1e-4)):
            distance = (result[name] - reference[name]).norm() / reference[name].norm()
            assert distance <= bound, (case, name, distance)
