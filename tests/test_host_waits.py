"""A training step hands its work to the device and never waits for it; losses that are no numbers change nothing."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from r1p_dist.adapters.low_rank import full_values
from r1p_dist.config import TrainConfig
from r1p_dist.fit import train_step
from r1p_dist.host_copy import HostCopy, on_device
from r1p_dist.host_waits import HostWaits
from r1p_dist.interrupts import StepAgreement
from r1p_dist.methods import make_method
from r1p_dist.optimizer import make_optimizer
from r1p_dist.recipes import load_config
from tests.small_clip import make_backbone
from tests.stages import Stages
from tests.test_parity import GLOBAL_BATCH, PROMPTS, global_batch

WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "_local_scalar_dense": lambda x: x.sum().item(),
    "nonzero": lambda x: x.nonzero(),
    "_unique2": lambda x: x.unique(),
    "index": lambda x: x[x > 1],
    "masked_select": lambda x: x.masked_select(x > 1),
    "equal": lambda x: torch.equal(x, x.clone()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
}
SMALL = ["options.rank=6", "options.active=3", "options.merged=2", f"train.global_batch_size={GLOBAL_BATCH}"]


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_counted(name: str) -> None:
    x = torch.arange(4.0)
    with HostWaits() as waits:
        WAITS[name](x)
    assert waits.calls == {name: 1}
    with HostWaits() as waits:
        (x.clamp(min=1)[torch.tensor([0, 2])] @ x[:2]).sort()
        HostCopy(x).read()
    assert not waits.calls


def waits_of_a_step(rank: int, world_size: int, cases: list[list[str]]) -> list[dict[str, int]]:
    found = []
    for overrides in cases:
        config = load_config("mini_mtil_dac", [*SMALL, *overrides])
        backbone = make_backbone()
        method = make_method(config, backbone)
        stages = Stages(method, config)
        prepare, trainer = backbone.preparer(PROMPTS), stages.begin(0)
        agreement, engine = stages.agreement, stages.engine
        accumulation = config.train.gradient_accumulation_steps
        for step in range(3):
            micro = [global_batch(0, step, GLOBAL_BATCH // accumulation) for _ in range(accumulation)]
            batches = [prepare(batch) for batch in micro]
            with HostWaits() as waits:
                train_step(method, trainer, batches, config.train)
            trainer.step_number = step + 1
            assert len(list(agreement.findings(keep=1))) == min(step, 1)
        found.append(dict(waits.calls))
        assert math.isfinite(stages.meter.read(0)[0]["loss"])
        engine.close()
    return found


def test_a_step_waits_for_nothing(run_distributed) -> None:
    ours = [
        ["deepspeed.config=zero0"],
        ["deepspeed.config=zero1", "train.precision=bf16"],
        ["deepspeed.config=zero2"],
        ["deepspeed.config=zero2", "train.precision=bf16"],
        ["deepspeed.config=zero2", "train.gradient_accumulation_steps=2", "options.vote=lagged"],
        ["deepspeed.config=zero2", "options.vote=local", "options.router_grad=gated"],
    ]
    # DeepSpeed's own: the norm of all gradients, and where it clips by it
    deepspeeds = [["deepspeed.config=zero3"], ["deepspeed.config=zero3", "train.precision=bf16"]]
    deepspeeds += [["deepspeed.config=zero2", "train.precision=bf16", "train.gradient_clipping=1.0"]]
    found = run_distributed(waits_of_a_step, 1, [*ours, *deepspeeds])[0]
    assert found == [{}] * len(ours) + [{"_local_scalar_dense": 1}] * len(deepspeeds)


def scaled_loss(compute: Callable, factor: float, *arguments: Any) -> tuple[torch.Tensor, dict]:
    return compute(*arguments)[0] * factor, {}


def steps_with_a_bad_one(rank: int, world_size: int, cases: list[list[str]]) -> list[dict[str, Any]]:
    """Three steps, the second with a loss that is no number; returns what was found, the weights and the rates."""
    found = []
    for overrides in cases:
        config = load_config("mini_mtil_dac", [*SMALL, *overrides, "train.iterations=10"])
        backbone = make_backbone()
        method = make_method(config, backbone)
        stages = Stages(method, config)
        prepare, trainer = backbone.preparer(PROMPTS), stages.begin(0)
        agreement, engine = stages.agreement, stages.engine
        compute = method.loss
        values, rates = [], []
        for step in range(3):
            factor = math.nan if step == 1 else 1.0
            method.loss = partial(scaled_loss, compute, factor)
            batches = [prepare(global_batch(0, step, GLOBAL_BATCH))]
            train_step(method, trainer, batches, config.train)
            trainer.step_number = step + 1
            values.append(torch.cat([v.flatten() for a in method.adapters for v in full_values(a.A, a.B)]))
            rates.append(engine.lr)
        findings = [[finding.step, finding.not_finite] for finding in agreement.findings()]
        found.append({"findings": findings, "values": values, "rates": rates, "loss": stages.meter.read(0)[0]["loss"]})
        engine.close()
    return found


def test_a_loss_that_is_not_finite_changes_nothing_and_is_known(run_distributed) -> None:
    bf16, clips = "train.precision=bf16", "train.gradient_clipping=1.0"
    cases = [["deepspeed.config=zero0"], ["deepspeed.config=zero0", bf16], ["deepspeed.config=zero2", clips]]
    cases += [["deepspeed.config=zero2", bf16], ["deepspeed.config=zero3"], ["deepspeed.config=zero3", bf16, clips]]
    found = run_distributed(steps_with_a_bad_one, 1, cases)[0]
    for case, result in zip(cases, found, strict=True):
        assert result["findings"] == [[1, False], [2, True], [3, False]], case
        before, bad, after = result["values"]
        assert torch.equal(before, bad) and not torch.equal(bad, after) and after.isfinite().all(), case
        assert result["rates"] == pytest.approx(found[0]["rates"]), (case, "the schedule counts every step")
        assert math.isfinite(result["loss"]) and result["loss"] > 0


def test_an_update_that_is_not_finite_is_not_made() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = make_optimizer([parameter], TrainConfig(lr=0.1, weight_decay=0.0))
    agreement = StepAgreement(torch.device("cpu"))
    optimizer.guard = agreement.exchange
    finite, bad = torch.ones(4), torch.tensor([1.0, math.nan, 1.0, 1.0])
    # (loss, gradient) of a step, and whether its update is made: then the value falls by lr, as Adam's first steps do
    steps = [(1.0, finite, True), (math.inf, finite, False), (1.0, bad, False), (math.nan, bad, False)]
    steps += [(1.0, finite, True)]
    updates = 0
    for number, (loss, gradient, is_made) in enumerate(steps):
        agreement.note(torch.tensor(loss), number)
        parameter.grad = gradient.clone()
        optimizer.step()
        updates += is_made
        torch.testing.assert_close(parameter.detach(), torch.full((4,), 1 - 0.1 * updates))
        assert optimizer.state[parameter]["step"] == updates
    found = [(finding.step, finding.not_finite) for finding in agreement.findings()]
    assert found == [(number, not is_made) for number, (*_, is_made) in enumerate(steps)]


def test_one_micro_batch_of_an_accumulation_is_enough() -> None:
    agreement = StepAgreement(torch.device("cpu"))
    for loss in (1.0, math.nan, 1.0):
        agreement.note(torch.tensor(loss), 1)
    assert agreement.exchange(torch.tensor(True)) == 1
    agreement.note(torch.tensor(1.0), 2)
    assert agreement.exchange(torch.tensor(True)) == 0


def test_batches_are_prepared_one_step_ahead_and_come_in_order() -> None:
    prepared = []

    def prepare(batch: dict) -> dict:
        prepared.append(int(batch["number"]))
        return batch | {"double": 2 * batch["number"]}

    steps = [[{"number": torch.tensor(2 * step + micro)} for micro in range(2)] for step in range(3)]
    seen = []
    for batches in on_device(iter(steps), prepare, torch.device("cpu")):
        assert all(batch["double"] == 2 * batch["number"] for batch in batches)
        seen += [int(batch["number"]) for batch in batches]
        assert prepared == list(range(min(len(seen) + 2, 6)))
    assert seen == list(range(6))
