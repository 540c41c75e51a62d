"""N ranks equal one rank for vision-language models, at every ZeRO stage: answers of unlike length, conversations
without pictures and with two, so that a rank can have no picture at all (DESIGN.md 5.1)."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import r1p_dist.engine
from r1p_dist.adapters.low_rank import full_values
from r1p_dist.data.samples import Sample, Turn
from r1p_dist.distributed import CollectiveCounter, rank, sum_over_ranks, world_size
from r1p_dist.kinds.llava import token_losses
from r1p_dist.methods import make_method
from r1p_dist.optimizer import make_optimizer
from r1p_dist.recipes import load_config
from tests import small_vlms
from tests.small_llava import make_backbone
from tests.stages import Stages

GLOBAL_BATCH, STEPS = 8, 2
LIMITS = [4, 7]  # new tokens, by rank
WORDS = ["cat", "a tall green tree by the sea", "no", "two red flags"]


def sample(task: int, number: int, has_one_turn: bool = False) -> Sample:
    """Conversations of unlike length; the second half of each global batch has no picture."""
    generator = np.random.default_rng([task, number])
    pictures = (1, 2, 1, 0, 0, 0, 0, 0)[number % GLOBAL_BATCH]
    images = tuple(Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)) for _ in range(pictures))
    turns = [Turn("user", "<image>\n" * pictures + f"what is number {number}?"), Turn("assistant", WORDS[number % 4])]
    if number % 3 == 0 and not has_one_turn:
        turns += [Turn("user", "sure?"), Turn("assistant", WORDS[(number + task) % 4])]
    return Sample(str(number), images, turns=tuple(turns), number=1000 * task + number)


def train(stage: int, optimizer: str, overrides: list[str], family: str = "llava") -> dict[str, Any]:
    """Trains two tasks; one of a family of small_vlms.py, for past tasks know nothing of families."""
    config = load_config(
        "mini_mtil_dac",
        [
            "backbone.kind=llava",
            f"train.global_batch_size={GLOBAL_BATCH}",
            f"train.iterations={STEPS}",
            "train.lr=0.3" if optimizer == "sgd" else "train.lr=1e-2",
            "options.active=3",
            "options.merged=2",
            "options.rank=6",
            "options.alpha=6.0",
            "options.ago.weight=0.5",
            f"deepspeed.config=zero{stage}",
            *(["deepspeed.overrides.zero_optimization.stage3_param_persistence_threshold=0"] if stage == 3 else []),
            *overrides,
        ],
    )
    make = small_vlms.make_backbone if family in small_vlms.FAMILIES else make_backbone
    backbone = make(family, cache_bytes=1 << 20, is_sharded=stage == 3)
    if config.backbone.gradient_checkpointing:
        backbone.checkpoint_blocks()
    method = make_method(config, backbone)
    # each case's own: several run in one process
    makers = {"sgd": lambda parameters, train: torch.optim.SGD(parameters, lr=train.lr), "adamw": make_optimizer}
    r1p_dist.engine.make_optimizer = makers[optimizer]
    has_one_turn = family == "paligemma"
    encoder, accumulation = backbone.encoder(config.data), config.train.gradient_accumulation_steps
    stages = Stages(method, config)
    losses, counts, experts, answers, collectives = [], [], [], [], []
    for task in range(1 if family in small_vlms.FAMILIES else 2):
        stages.begin(task)
        engine = stages.engine
        for _ in range(STEPS):
            numbers = np.arange(GLOBAL_BATCH).reshape(accumulation, world_size(), -1)[:, rank()]
            batches = []
            for mine in numbers:
                samples = [sample(task, number, has_one_turn) for number in mine]
                batch = encoder.collate([encoder.train(entry, None) for entry in samples])
                batch["sample"] = torch.tensor([entry.number for entry in samples])
                batches.append(backbone.prepare(batch))
            with CollectiveCounter() as counter:
                backbone.begin_step(batches, config.train)
                total = torch.zeros(())
                for batch in batches:
                    loss, _ = method.loss(engine, batch)
                    total += loss.detach() / accumulation
                    if engine.step(loss):
                        method.after_step(stages.trainer)
            collectives.append(counter.summary())
            losses.append(sum_over_ranks(total) / world_size())
            counts.append(torch.stack([adapter.activation_counts for adapter in method.adapters]).clone())
            experts.append(torch.cat([v.flatten() for a in method.adapters for v in full_values(a.A, a.B)]))
        stages.end()
        backbone.eval()
        blank = encoder.collate([encoder.blank()])
        questions = [encoder.evaluate(sample(task, number, has_one_turn)) for number in range(rank(), 5, world_size())]
        limits = LIMITS if world_size() == 1 else [LIMITS[rank()]]  # ranks stop at unlike lengths
        found = [backbone.answer(engine, encoder.collate(questions), limit) for limit in limits]
        backbone.answer(engine, blank, 3)
        answers.append([[text for text, _ in texts] for texts in found])
        engine.close()
    return {
        "loss": torch.stack(losses),
        "counts": torch.stack(counts),
        "experts": torch.stack(experts),
        "delta": torch.cat([adapter.merged_delta().flatten() for adapter in method.adapters]),
        "answers": answers,
        "collectives": collectives,
        "names": [adapter.name for adapter in method.adapters],
    }


def run_cases(rank: int, world_size: int, cases: list[tuple]) -> list[dict[str, Any]]:
    token_losses.CHUNK_LOGITS = 7 * small_vlms.TEXT["vocab_size"]  # several chunks, other ones on each rank
    return [train(*case) for case in cases]


CHECKPOINTING = "backbone.gradient_checkpointing=true"
TOWER = ["targets.towers=[language,projector,image]"]
CASES = [
    (0, "sgd", []),
    (1, "sgd", ["train.average_over=samples", "train.gradient_accumulation_steps=2"]),
    (2, "sgd", ["options.vote=lagged", *TOWER]),
    (3, "adamw", [CHECKPOINTING]),
    (3, "sgd", ["train.gradient_accumulation_steps=2", *TOWER]),
    (3, "sgd", [], "llava_next"),
    (3, "sgd", ["data.packing=true", "options.guide.language=mean"]),
    (2, "adamw", ["data.packing=true", CHECKPOINTING], "qwen2_5_vl"),
]
MORE_CASES = [(stage, "sgd", []) for stage in (1, 2, 3)] + [
    (2, "adamw", []),
    (3, "sgd", ["options.guide.language=last_prompt", "options.guide.projector=mean"]),
    (2, "sgd", ["options.router_grad=gated", "targets.towers=[language]", "options.guide.language=mean"]),
    (3, "sgd", TOWER + ["options.guide.image=mean"], "llava_onevision"),
]
VLM_CASES = [
    (stage, "sgd", ["options.guide.projector=mean", "options.guide.image=mean", *TOWER], family)
    if stage in (0, 2)
    else (stage, "sgd", [CHECKPOINTING], family)
    for family in small_vlms.FAMILIES
    for stage in range(4)
]
TWINS = ("qwen2_vl", "smolvlm")  # of families with the same code here


def on_one_rank(case: tuple) -> tuple:
    """What a case is compared with: ZeRO 0 without checkpointing."""
    _, optimizer, overrides, *family = case
    return (0, optimizer, [override for override in overrides if override != CHECKPOINTING], *family)


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        CASES,
        [case for case in VLM_CASES if case[-1] not in TWINS],
        pytest.param([*MORE_CASES, *(case for case in VLM_CASES if case[-1] in TWINS)], marks=pytest.mark.campaign),
    ],
)
def test_ranks_and_stages_equal_one_rank(run_distributed, cases: list[tuple]) -> None:
    wanted = [on_one_rank(case) for case in cases]
    singles = [case for number, case in enumerate(wanted) if case not in wanted[:number]]  # stages share theirs
    found = run_distributed(run_cases, 1, singles, timeout_s=1100)[0]
    references = [found[singles.index(case)] for case in wanted]
    results = run_distributed(run_cases, 2, cases, timeout_s=1100)
    for case, reference, first, second in zip(cases, references, *results, strict=True):
        bound = 1e-3 if case[1] == "adamw" else 1e-5
        assert torch.equal(first["counts"], reference["counts"]), case
        assert reference["delta"].norm() > 1e-4, case
        for name in ("loss", "experts", "delta"):
            assert relative(first[name], reference[name]) <= bound, (case, name)
        for task, (short, long) in enumerate(reference["answers"]):
            # rank 0 has questions 0, 2 and 4, rank 1 has 1 and 3
            assert first["answers"][task] == [short[::2]] and second["answers"][task] == [long[1::2]], case
            holds = any if case in VLM_CASES else all  # random bytes can be blanks, which are cut off
            assert holds(short), "an empty answer shows nothing"
            assert holds(len(more) > len(text) for text, more in zip(short, long, strict=True)), case
