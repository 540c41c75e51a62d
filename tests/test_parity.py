"""N ranks equal one rank, at every ZeRO stage: losses, AGO, votes, counts, experts and merged updates (DESIGN.md
5.1)."""

from typing import Any

import pytest
import torch

import r1p_dist.engine
from r1p_dist import attach_pool
from r1p_dist.adapters import AdaptedLinear
from r1p_dist.adapters.low_rank import full_values
from r1p_dist.adapters.pool import share_votes
from r1p_dist.distributed import CollectiveCounter, gather, rank, sum_over_ranks, world_size
from r1p_dist.methods import make_method
from r1p_dist.recipes import load_config
from tests.small_clip import make_backbone
from tests.stages import Stages

GLOBAL_BATCH, STEPS, TASKS = 16, 2, 3
PROMPTS = ["cat", "tall tree", "sea", "a red flag"]


def global_batch(task: int, micro_step: int, size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * task + micro_step)
    image = torch.randn(size, 3, 16, 16, generator=generator)
    # uneven labels: the first class has most samples, and the ranks hold different classes
    label = (torch.rand(size, generator=generator).pow(3) * len(PROMPTS)).long().sort().values
    return {"image": image + 3 * label[:, None, None, None], "label": label}


def train(stage: int, optimizer: str, overrides: list[str], checkpointing: bool) -> dict[str, Any]:
    config = load_config(
        "mini_mtil",
        [
            f"train.global_batch_size={GLOBAL_BATCH}",
            f"train.iterations={STEPS}",
            "train.lr=0.3" if optimizer == "sgd" else "train.lr=1e-2",
            "options.active=3",
            "options.merged=2",
            "options.rank=6",
            "options.dropout=0.0",
            "options.alpha=6.0",
            "options.ago.weight=0.5",
            f"deepspeed.config=zero{stage}",
            *(["deepspeed.overrides.zero_optimization.stage3_param_persistence_threshold=0"] if stage == 3 else []),
            *overrides,
        ],
    )
    backbone = make_backbone()
    if checkpointing:
        backbone.checkpoint_blocks()
    method = make_method(config, backbone)
    prepare = backbone.preparer(PROMPTS)
    if optimizer == "sgd":
        r1p_dist.engine.make_optimizer = lambda parameters, train: torch.optim.SGD(parameters, lr=train.lr)
    else:
        r1p_dist.engine.make_optimizer = lambda parameters, train: torch.optim.AdamW(parameters, lr=train.lr)
    accumulation = config.train.gradient_accumulation_steps
    stages = Stages(method, config)
    losses, agos, counts, experts, gates = [], [], [], [], []
    for task in range(TASKS):
        stages.begin(task)
        engine = stages.engine
        for step in range(STEPS * accumulation):
            batch = global_batch(task, step, GLOBAL_BATCH // accumulation)
            mine = {name: tensor.chunk(world_size())[rank()] for name, tensor in batch.items()}
            loss, parts = method.loss(engine, prepare(mine))
            losses.append(sum_over_ranks(loss.detach().clone()) / world_size())
            agos.append(parts.get("ago", torch.zeros(())))
            if engine.step(loss):
                method.after_step(stages.trainer)
                counts.append(torch.stack([adapter.activation_counts for adapter in method.adapters]).clone())
                experts.append(
                    torch.cat([v.flatten() for a in method.adapters for v in full_values(a.A, a.B, a.router.weight)])
                )
        stages.end()
        engine.close()
    for adapter in method.adapters:
        gates.append(adapter.gate_sum)
    # the weights as the model uses them, gathered where ZeRO-3 shards them
    weights = torch.cat([value.flatten() for a in method.adapters for value in full_values(a.linear.weight)])
    return {
        "loss": torch.stack(losses),
        "ago": torch.stack(agos),
        "counts": torch.stack(counts),
        "experts": torch.stack(experts),
        "delta": torch.cat([adapter.merged_delta().flatten() for adapter in method.adapters]),
        "weights": weights,
        "gates": torch.stack(gates),
        "same_on_ranks": bool((gather(weights[None]) == weights).all()),
    }


def run_cases(rank: int, world_size: int, cases: list[tuple]) -> list[dict[str, Any]]:
    return [train(*case) for case in cases]


def as_on_one_rank(cases: list[tuple]) -> list[tuple]:
    """What cases are compared with, each once: ZeRO 0 without checkpointing."""
    return list({str(case[1:3]): (0, case[1], case[2], False) for case in cases}.values())


# On four ranks the first ones alone, unless all tests are asked for.
CASES = [
    (0, "sgd", [], False),
    (1, "sgd", [], True),
    (2, "adamw", [], False),
    (3, "sgd", ["train.gradient_accumulation_steps=2"], True),
    (1, "sgd", [], False),
    (2, "sgd", [], False),
    (3, "sgd", [], False),
    (3, "adamw", [], False),
    (0, "sgd", ["train.gradient_accumulation_steps=2"], False),
    (2, "sgd", ["options.router_grad=straight_through"], False),
    (3, "sgd", ["options.router_grad=gated", "options.guide.text=eot", "options.guide.image=mean"], True),
    (2, "sgd", ["options.vote=lagged"], False),
    (3, "sgd", ["options.vote=lagged", "train.gradient_accumulation_steps=2"], True),
]


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


@pytest.fixture(scope="module")
def references(run_distributed) -> dict[str, dict[str, Any]]:
    """By optimizer and overrides."""
    cases = as_on_one_rank(CASES)
    results = run_distributed(run_cases, 1, cases, timeout_s=1100)[0]
    return {str(case[1:3]): result for case, result in zip(cases, results, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, cases", [(2, CASES), (4, CASES[:4]), pytest.param(4, CASES[4:], marks=pytest.mark.campaign)]
)
def test_ranks_and_stages_equal_one_rank(run_distributed, references, ranks: int, cases: list[tuple]) -> None:
    results = run_distributed(run_cases, ranks, cases, timeout_s=1100)[0]
    for case, result in zip(cases, results, strict=True):
        reference = references[str(case[1:3])]
        bound = 1e-3 if case[1] == "adamw" else 1e-5
        assert result["same_on_ranks"], case
        assert torch.equal(result["counts"], reference["counts"]), case
        assert (result["ago"] > 0).sum() >= STEPS, "the case must have an AGO loss to compare"
        assert (reference["delta"].norm() > 1e-3) and (
            reference["experts"][0] - reference["experts"][STEPS - 1]
        ).norm() > 1e-3
        for name in ("loss", "ago", "experts", "delta"):
            assert relative(result[name], reference[name]) <= bound, (case, name)
        assert relative(result["weights"], reference["weights"]) <= 1e-6, case


def test_stages_equal_each_other_on_one_rank(run_distributed) -> None:
    cases = [(stage, "sgd", [], False) for stage in (0, 1, 2, 3)]
    plain, *others = run_distributed(run_cases, 1, cases)[0]
    for case, other in zip(cases[1:], others, strict=True):
        assert torch.equal(other["counts"], plain["counts"]), case
        for name in ("loss", "ago", "experts", "delta", "weights"):
            assert relative(other[name], plain[name]) <= 1e-6, (case, name)


def local_votes(rank: int, world_size: int) -> list[dict[str, Any]]:
    return [train(stage, "sgd", ["options.vote=local"], False) for stage in (2, 3)]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.campaign)])
def test_local_votes_are_counted_over_all_ranks(run_distributed, ranks: int) -> None:
    first, *others = run_distributed(local_votes, ranks, timeout_s=1100)
    for stage, result in enumerate(first):
        # every sample casts 3 votes per layer and step
        steps = result["counts"].view(TASKS, STEPS, -1, 6).sum(-1)
        expected = 3 * GLOBAL_BATCH * torch.arange(1, STEPS + 1)
        assert torch.equal(steps, expected.view(1, STEPS, 1).expand_as(steps))
        assert result["same_on_ranks"] and result["ago"].max() > 0
        for other in others:  # counts, AGO selection and merge agree, though the experts in use differ
            for name in ("counts", "ago", "experts", "delta", "weights"):
                assert torch.equal(other[stage][name], result[name]), name


def test_local_votes_really_differ_between_ranks(run_distributed) -> None:
    first, second = run_distributed(active_experts, 2)
    assert first != second


def active_experts(rank: int, world_size: int) -> list[list[int]]:
    backbone = make_backbone()
    adapted = attach_pool(backbone, rank=6, active=3, merged=2, vote="local").adapters
    backbone(image=global_batch(0, 0, GLOBAL_BATCH)["image"].chunk(world_size)[rank])
    return [adapter._active.tolist() for adapter in adapted if adapter.name.startswith("image")]


def collectives(rank: int, world_size: int, vote: str) -> list[dict]:
    """Returns what travels in each of three steps."""
    backbone = make_backbone()
    adapted = attach_pool(backbone, rank=6, active=3, merged=2, vote=vote).adapters
    prepare = backbone.preparer(PROMPTS)
    steps = []
    for step in range(3):
        batch = {name: value.chunk(world_size)[rank] for name, value in global_batch(0, step, GLOBAL_BATCH).items()}
        with CollectiveCounter() as counter:
            backbone.loss(backbone, prepare(batch)).backward()
            share_votes(adapted)
        steps.append(counter.summary())
    return steps


@pytest.mark.parametrize("vote", ["global", "lagged", "local"])
def test_votes_travel_once_per_group_or_once_per_step(run_distributed, vote: str) -> None:
    features = 2 * GLOBAL_BATCH * 24 * 4  # image and text features of the global batch, fp32, and its labels, int64
    gathers = {"calls": 3, "bytes": features + GLOBAL_BATCH * 8}
    returned = {"calls": 2, "bytes": features}  # their gradients
    adapters, groups, one = 2 * 2 * 6, 2 * 2 * 4, 6 * 8  # towers, blocks; bytes of one vector of votes, int64
    per_group = {"calls": groups, "bytes": adapters * one}
    fused = {"calls": 1, "bytes": adapters * one}
    expected = {
        "global": [[per_group]] * 3,
        "lagged": [[per_group, fused], [fused], [fused]],
        "local": [[fused]] * 3,
    }[vote]
    for steps in run_distributed(collectives, 2, vote):
        for step, votes in zip(steps, expected, strict=True):
            assert step["allgather"] == gathers
            assert step["reduce_scatter_base"] == returned
            assert step["allreduce"] == {what: sum(vote[what] for vote in votes) for what in ("calls", "bytes")}
            assert set(step) == {"allgather", "reduce_scatter_base", "allreduce"}


def half_precision_output(rank: int, world_size: int) -> torch.Tensor:
    torch.manual_seed(0)
    adapted = AdaptedLinear(torch.nn.Linear(64, 96), rank=6, active=3, merged=2).bfloat16()
    torch.nn.init.normal_(adapted.B, std=1e-4)
    x = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    return adapted(x).detach()  # every rank has the same samples, so the votes are the same as on one rank


def test_small_updates_survive_bf16_on_several_ranks_too(run_distributed) -> None:
    """The frozen product must not be rounded before the update is there, though it could run while votes travel."""
    one = run_distributed(half_precision_output, 1)[0]
    for output in run_distributed(half_precision_output, 2):
        assert torch.equal(output, one)
