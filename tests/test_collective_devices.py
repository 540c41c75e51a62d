"""Every tensor that is given to a collective lies on a device that the backend serves: nccl knows none of the CPU."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.weak import WeakTensorKeyDictionary

from r1p_dist import distributed
from tests.test_resume import assert_equal, run_in_parts

PACKAGE = Path(__file__).parents[1] / "r1p_dist"
# Which argument of a collective has the data.
DATA = {"all_reduce": 0, "reduce": 0, "broadcast": 0, "all_gather": 1, distributed.REDUCE_SCATTER: 1}

CALLS: dict[str, Callable[[], Any]] = {
    "sum_over_ranks": lambda: distributed.sum_over_ranks(torch.zeros(4)),
    "sum_on_first_rank": lambda: distributed.sum_on_first_rank(torch.zeros(4)),
    "start_sum_over_ranks": lambda: distributed.start_sum_over_ranks(torch.zeros(4)).wait(),
    "sum_over_ranks_with_gradient": lambda: distributed.sum_over_ranks_with_gradient(torch.zeros(4)),
    "start_gather": lambda: distributed.start_gather(torch.zeros(4)).wait(),
    "gather_with_gradient": lambda: distributed.gather_with_gradient(torch.zeros(4, requires_grad=True)),
    "the gather's backward": lambda: distributed._Gather.backward(None, torch.zeros(4)),
    "gather": lambda: distributed.gather(torch.zeros(4)),
    "agree": lambda: distributed.agree(dict),
    "gather_bytes": lambda: distributed.gather_bytes(b"content"),
}


@pytest.fixture
def group_without_cpu(monkeypatch: pytest.MonkeyPatch):
    """Rank 0 of two whose backend serves no CPU, as nccl does; what it serves has no values."""
    dist.init_process_group("meta:fake", store=FakeStore(), rank=0, world_size=2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CALLS)
def test_tensors_of_the_cpu_travel_by_the_backends_device(group_without_cpu, name: str) -> None:
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(torch.zeros(4))
    # they got there and back: only values are missing
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        CALLS[name]()


def test_no_other_module_calls_collectives() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name == "distributed.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("torch.distributed")], f"{path}: use distributed.py"
            if isinstance(node, ast.Attribute) and node.attr in {*DATA, "all_to_all", "barrier", "send", "recv"}:
                assert ast.unparse(node.value) not in ("dist", "torch.distributed", "deepspeed.comm"), path


class CarriedOnly:
    """Stands in for torch.distributed: takes tensors alone that `_to_backend` has carried over."""

    def __init__(self) -> None:
        self.carried = WeakTensorKeyDictionary()
        self.calls = dict.fromkeys(DATA, 0)

    def carry(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()  # as on a device of its own
        self.carried[copy] = True
        return copy

    def __getattr__(self, name: str) -> Any:
        function = getattr(dist, name)
        if name not in DATA:
            return function

        def checked(*arguments: Any, **options: Any) -> Any:
            data = arguments[DATA[name]]
            assert data in self.carried, f"{name} of {data.dtype} {tuple(data.shape)} from the wrong device"
            self.calls[name] += 1
            return function(*arguments, **options)

        return checked


def run_with_carried_tensors(rank: int, world_size: int, folder: str, overrides: list[str]) -> dict[str, Any]:
    """A run beside one whose tensors are all carried to another place and back, with a stop and a resume in between."""
    strict = CarriedOnly()
    distributed.dist, distributed._to_backend = strict, strict.carry
    endings = run_in_parts(rank, world_size, folder, overrides, signals=[6])
    return {"endings": endings, "calls": strict.calls}


@pytest.mark.slow
def test_a_whole_run_gives_no_other_tensor_to_a_collective(
    run_distributed, shallow_toy: list[str], tmp_path: Path
) -> None:
    overrides = [*shallow_toy, "deepspeed.config=zero2", "checkpoint.every_steps=2"]
    for found in run_distributed(run_with_carried_tensors, 2, str(tmp_path), overrides, timeout_s=1100):
        assert [ending.split()[0] for ending in found["endings"]] == ["SIGUSR2", "finished"]
        assert min(found["calls"].values()) > 0, "every kind of collective must have been called"
    assert_equal(tmp_path / "calm", tmp_path / "stopped")
