"""Capture and restore at every ZeRO stage: against DeepSpeed's own accessors, and bit for bit into another engine."""

import warnings

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from r1p_dist.checkpoint import Capture, restore_values
from r1p_dist.distributed import rank, world_size
from r1p_dist.engine import TaskEngine
from r1p_dist.errors import InputError
from r1p_dist.methods import make_method
from r1p_dist.optimizer_state import adam_steps, part_of
from r1p_dist.recipes import load_config
from tests.small_clip import make_backbone

SHARDED = "deepspeed.overrides.zero_optimization.stage3_param_persistence_threshold=0"
HOST = "deepspeed.overrides.zero_optimization.offload_optimizer={device: cpu, pin_memory: false}"
CASES = {
    "stage 0": ["deepspeed.config=zero0"],
    "stage 0 bf16": ["deepspeed.config=zero0", "train.precision=bf16"],
    "stage 1": ["deepspeed.config=zero1"],
    "stage 2 bf16": ["deepspeed.config=zero2", "train.precision=bf16"],
    "stage 3": ["deepspeed.config=zero3"],
    "stage 3 sharded bf16": ["deepspeed.config=zero3", SHARDED, "train.precision=bf16"],
}


class Training:
    """A task in training on a small CLIP: `step` returns what the next forward depends on."""

    def __init__(self, overrides: list[str]) -> None:
        settings = [
            "train.global_batch_size=8",
            "train.lr=1e-1",
            "train.iterations=6",
            "options.rank=6",
            "options.active=3",
        ]
        self.config = load_config("mini_mtil", [*settings, "options.merged=2", *overrides])
        self.backbone = make_backbone(layers=1)
        self.method = make_method(self.config, self.backbone)
        self.prepare = self.backbone.preparer(["cat", "tree", "sea"])
        self.method.prepare(0)
        self.engine = TaskEngine(self.backbone, self.config, self.config.train, world_size())
        self.parameters = self.method.trainable_parameters()
        self.backbone.train()

    def step(self, number: int) -> float:
        generator = torch.Generator().manual_seed(number)
        image = torch.randn(8, 3, 16, 16, generator=generator).chunk(world_size())[rank()]
        label = torch.arange(8).remainder(3).chunk(world_size())[rank()]
        loss, _ = self.method.loss(self.engine, self.prepare({"image": image, "label": label}))
        self.engine.step(loss)
        self.method.after_step(None)
        return loss.item()

    def capture(self) -> Capture:
        return Capture(self.parameters, self.engine.engine, torch.arange(5, dtype=torch.uint8) + 10 * rank())


def capture_and_restore(rank_: int, world: int, overrides: list[str]) -> dict:
    warnings.simplefilter("ignore")
    first = Training(overrides)
    losses = [first.step(number) for number in range(3)]
    capture = first.capture()
    state = {name: value.clone() for name, value in first.method.state().items()}
    tensors = capture.tensors() if rank() == 0 else {}
    facts = {"losses": losses}
    facts["equals DeepSpeed's"] = True
    if hasattr(next(iter(first.parameters.values())), "ds_id") or hasattr(
        next(iter(first.parameters.values())), "_hp_mapping"
    ):
        for name, parameter in first.parameters.items():
            theirs = {"value": safe_get_full_fp32_param(parameter)}
            theirs |= {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
            if rank() == 0:
                equal = all(torch.equal(tensors[f"{name}.{key}"], value) for key, value in theirs.items())
                facts["equals DeepSpeed's"] &= equal
    steps = adam_steps(first.engine.engine)
    facts["losses after"] = [first.step(number) for number in range(3, 6)]
    last = first.capture()

    box = [tensors]
    torch.distributed.broadcast_object_list(box)
    second = Training(overrides)
    restore_values(second.parameters, second.engine.engine, box[0], "checkpoint")
    second.method.load_state(state)
    second.engine.go_on_at(3, steps)
    again = second.capture()
    facts["losses resumed"] = [second.step(number) for number in range(3, 6)]
    end = second.capture()
    if rank() == 0:
        facts["locals"] = capture.locals().tolist()
        facts["is restored"] = all(torch.equal(tensors[name], value) for name, value in again.tensors().items())
        facts["ends equal"] = all(torch.equal(last.tensors()[name], value) for name, value in end.tensors().items())
        facts["moves"] = any(not torch.equal(tensors[name], value) for name, value in end.tensors().items())
    return facts


def capture_and_restore_all(rank_: int, world: int) -> dict:
    return {case: capture_and_restore(rank_, world, overrides) for case, overrides in CASES.items()}


@pytest.fixture(scope="module", params=[1, 2])
def restored(request, run_distributed) -> tuple[int, list[dict]]:
    return request.param, run_distributed(capture_and_restore_all, request.param, timeout_s=1100)


@pytest.mark.parametrize("case", CASES)
def test_a_restored_training_goes_on_bit_for_bit(restored: tuple[int, list[dict]], case: str) -> None:
    world, ranks = restored
    for facts in ranks:
        assert facts[case]["equals DeepSpeed's"]
        assert facts[case]["losses resumed"] == facts[case]["losses after"] != facts[case]["losses"]
    first = ranks[0][case]
    assert first["is restored"] and first["ends equal"] and first["moves"]
    assert first["locals"] == [[10 * number + byte for byte in range(5)] for number in range(world)]


def capture_behind_an_engine_that_is_deleted_late(rank_: int, world: int) -> list[bool]:
    warnings.simplefilter("ignore")
    whole = []
    for case in ("stage 0", "stage 1", "stage 2 bf16", "stage 3"):
        training = Training(CASES[case])
        training.step(0)
        first = training.engine
        first.close()
        training.engine = TaskEngine(training.backbone, training.config, training.config.train, world_size())
        first.engine.__del__()  # as Python's garbage collector does when it comes to it
        training.step(1)
        tensors = training.capture().tensors() if rank() == 0 else {}
        if rank() != 0:
            training.capture()
        whole.append(all(value.count_nonzero() for name, value in tensors.items() if name.endswith("A.exp_avg_sq")))
    return whole


def test_an_engine_that_is_deleted_late_takes_nothing_from_the_next(run_distributed) -> None:
    assert run_distributed(capture_behind_an_engine_that_is_deleted_late, 2)[0] == [True] * 4


def a_save_that_lacks_a_part(rank_: int, world: int) -> str:
    warnings.simplefilter("ignore")
    training = Training(CASES["stage 1"])
    training.step(0)
    if rank() == 1:
        for parameter in training.parameters.values():
            parameter._hp_mapping = None
    try:
        training.capture()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_save_that_lacks_a_part_fails(run_distributed) -> None:
    for message in run_distributed(a_save_that_lacks_a_part, 2):
        assert message.endswith("the ranks' parts do not make a whole")


def restore_on_another_world(rank_: int, world: int, overrides: list[str], content: dict | None) -> dict:
    warnings.simplefilter("ignore")
    training = Training(overrides)
    if content is None:
        for number in range(2):
            training.step(number)
    else:
        restore_values(training.parameters, training.engine.engine, content, "checkpoint")
    capture = training.capture()
    return capture.tensors() if rank() == 0 else {}


@pytest.mark.parametrize(("before", "after"), [("stage 1", "stage 3"), ("stage 3", "stage 0")])
def test_other_ranks_and_stages_take_the_same_numbers(run_distributed, before: str, after: str) -> None:
    tensors = run_distributed(restore_on_another_world, 2, CASES[before], None)[0]
    again = run_distributed(restore_on_another_world, 4 if before == "stage 1" else 1, CASES[after], tensors)[0]
    assert tensors.keys() == again.keys() and len(tensors) > 50
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert {name.rpartition(".")[2] for name in tensors} == {"value", "exp_avg", "exp_avg_sq"}


def refuse_other_tensors(rank_: int, world: int) -> list[str]:
    warnings.simplefilter("ignore")
    training = Training([])
    good = training.capture().tensors()
    first = next(iter(good))
    cases = [
        {name: value for name, value in good.items() if name != first},
        good | {"odd.value": torch.zeros(1)},
        good | {first: torch.zeros(3)},
        good | {first: good[first].double()},
        good | {first: good[first][:0]},
    ]
    messages = []
    for case in cases:
        try:
            restore_values(training.parameters, training.engine.engine, case, "checkpoint")
        except InputError as error:
            messages.append(str(error))
    unchanged = training.capture().tensors()
    assert all(torch.equal(good[name], unchanged[name]) for name in good)
    assert part_of(training.engine.engine, next(iter(training.parameters.values()))).start == 0
    return messages


def test_other_tensors_are_refused_before_anything_is_written(run_distributed) -> None:
    messages = run_distributed(refuse_other_tensors, 1)[0]
    assert len(messages) == 5 and all(message.startswith("checkpoint: ") for message in messages)
    assert "holds other tensors" in messages[0] and "odd.value" in messages[1] and "(3,)" in messages[2]
