"""The optimizer step of a task on its engine: AdamW, schedule, decay and clipping, each number by number in Python."""

from collections.abc import Iterator
from math import cos, pi, sqrt

import pytest
import torch
from torch import nn

from r1p_dist.config import RunConfig, TrainConfig
from r1p_dist.engine import TaskEngine, start_process_group
from r1p_dist.methods import make_method
from r1p_dist.protocol import Stage
from r1p_dist.recipes import load_config
from tests.small_clip import make_backbone

START = [0.5, -1.0, 2.0]
GRADIENTS = [
    [0.3, -0.2, 0.1],
    [3.0, 4.0, -12.0],
    [-0.1, 0.0, 0.2],
    [2.0, -2.0, 1.0],
    [0.05, 0.4, -0.3],
    [0.1, 6.0, 8.0],
]
ITERATIONS = len(GRADIENTS)


class Vector(nn.Module):
    """A model whose gradient is what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(START))

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        return (self.w * gradient).sum()


@pytest.fixture(scope="module", autouse=True)
def process_group() -> None:
    start_process_group()


def configure(stage: int, *overrides: str) -> RunConfig:
    own = [f"train.iterations={ITERATIONS}", "train.global_batch_size=1", f"deepspeed.config=zero{stage}"]
    return load_config("mini_mtil_dac", [*own, *overrides])


def adamw(train: TrainConfig, rates: list[float]) -> Iterator[list[float]]:
    """Yields the values after each step: Loshchilov and Hutter's algorithm 2, gradients clipped to a common norm."""
    values, first, second = list(START), [0.0] * 3, [0.0] * 3
    beta1, beta2 = train.betas
    for step, (gradient, lr) in enumerate(zip(GRADIENTS, rates, strict=True), 1):
        norm = sqrt(sum(g * g for g in gradient))
        if train.gradient_clipping is not None and norm > train.gradient_clipping:
            gradient = [g * train.gradient_clipping / norm for g in gradient]
        for i, g in enumerate(gradient):
            values[i] -= lr * train.weight_decay * values[i]
            first[i] = beta1 * first[i] + (1 - beta1) * g
            second[i] = beta2 * second[i] + (1 - beta2) * g * g
            values[i] -= lr * (first[i] / (1 - beta1**step)) / (sqrt(second[i] / (1 - beta2**step)) + 1e-8)
        yield list(values)


HALF_COSINES = [0.5 + 0.5 * cos(pi * quarter / 4) for quarter in range(4)]
SCHEDULES = {
    # two steps of six up to the rate, then from it towards a tenth, which the step behind the last one would have
    "warm-up, then cosine": (
        ["train.warmup_steps=2", "train.min_lr=0.01"],
        [0.05, 0.1, *(0.01 + 0.09 * half for half in HALF_COSINES)],
    ),
    "cosine alone": (
        ["train.min_lr=0.04"],
        [0.04 + 0.06 * (0.5 + 0.5 * cos(pi * step / 6)) for step in range(6)],
    ),
    "constant": (["train.min_lr=0.1"], [0.1] * 6),
}
CASES = {
    "plain": ["train.weight_decay=0.0"],
    "decay": ["train.weight_decay=0.3"],
    "other betas": ["train.weight_decay=0.0", "train.betas=[0.6, 0.7]"],
    "clipping": ["train.weight_decay=0.0", "train.gradient_clipping=1.5"],
    "all": ["train.weight_decay=0.2", "train.betas=[0.8, 0.9]", "train.gradient_clipping=0.4"],
}


def check(config: RunConfig, rates: list[float]) -> None:
    model = Vector()
    engine = TaskEngine(model, config, config.train, 1)
    for gradient, lr, expected in zip(GRADIENTS, rates, adamw(config.train, rates), strict=True):
        assert engine.lr == pytest.approx(lr, rel=1e-9)
        assert engine.step(engine(torch.tensor(gradient)))
        torch.testing.assert_close(model.w.tolist(), expected, rtol=1e-5, atol=1e-6)
    engine.close()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_of_every_step(schedule: str) -> None:
    overrides, rates = SCHEDULES[schedule]
    check(configure(0, "train.lr=0.1", *overrides), rates)


# names of torch that DeepSpeed's ZeRO-3 calls, as in start_process_group
@pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning")
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_number_after_every_step(case: str, stage: int) -> None:
    overrides, rates = SCHEDULES["warm-up, then cosine"]
    check(configure(stage, "train.lr=0.1", *overrides, *CASES[case]), rates)


def test_a_resumed_stage_goes_on_with_the_rate_of_its_step() -> None:
    overrides, rates = SCHEDULES["warm-up, then cosine"]
    config = configure(0, "train.lr=0.1", *overrides)
    engine = TaskEngine(Vector(), config, config.train, 1)
    engine.go_on_at(3, 3)
    for lr in rates[3:]:
        assert engine.lr == pytest.approx(lr, rel=1e-9)
        engine.step(engine(torch.ones(3)))
    engine.close()


def test_a_stage_trains_with_its_tasks_values_for_as_long_as_the_stage_is() -> None:
    own = ["train.per_task.fashion.lr=0.03", "train.per_task.fashion.weight_decay=0.5", "train.warmup_steps=1"]
    config = configure(0, "method=lora", "train.lr=0.1", *own)
    method = make_method(config, make_backbone())
    found = [method.train_config(Stage(name, (), 9)) for name in ("fashion", "joint")]
    assert [(train.lr, train.weight_decay, train.warmup_steps, train.iterations) for train in found] == [
        (0.03, 0.5, 1, 9),
        (0.1, 0.01, 1, 9),
    ]
