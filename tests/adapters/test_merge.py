"""Merging and un-merging: exact, from the pristine weight, and with no growth but the factors."""

import gc
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from r1p_dist.adapters import AdaptedLinear, Factors, FusedProjection
from r1p_dist.adapters import pristine as pristine_module
from r1p_dist.adapters.pristine import file_backed_copy

IN, OUT = 24, 40


def update(seed: int, out: int = OUT, columns: int = 4) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(columns, IN, generator=generator), torch.randn(out, columns, generator=generator), 0.1)


def make(dtype: torch.dtype = torch.float32) -> AdaptedLinear:
    torch.manual_seed(0)
    return AdaptedLinear(nn.Linear(IN, OUT, dtype=dtype), rank=6, active=5, merged=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("task", [0, 1, 2, 3])
def test_any_task_can_be_taken_out_again_exactly(dtype: torch.dtype, task: int) -> None:
    adapted, other = make(dtype), make(dtype)
    pristine = adapted.linear.weight.clone()
    for seed in range(4):
        adapted.merge_update(update(seed))
        if seed != task:
            other.merge_update(update(seed))
    adapted.unmerge(task)
    assert torch.equal(adapted.linear.weight, other.linear.weight)
    assert torch.equal(adapted.past_B, torch.cat([update(seed).B for seed in range(4) if seed != task], dim=1))
    assert torch.equal(adapted.merged_delta(), other.merged_delta())
    for _ in range(3):
        adapted.unmerge(0)
    assert torch.equal(adapted.linear.weight, pristine) and adapted.past_B.shape == (OUT, 0)


def test_past_columns_are_kept_once_in_the_order_of_tasks() -> None:
    adapted = make()
    for seed in range(3):
        adapted.merge_update(update(seed))
    assert torch.equal(adapted.past_B, torch.cat([update(seed).B for seed in range(3)], dim=1))
    storages = {
        tensor.untyped_storage().data_ptr() for tensor in [adapted.past_B, *(past.B for past in adapted.merged)]
    }
    assert len(storages) == 1


def stored_bytes() -> int:
    """Returns the bytes of all live tensors' storages."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not issubclass(
            type(thing), FakeTensor
        ):  # of a compiler: no memory
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_fifty_tasks_add_their_factors_and_nothing_else() -> None:
    torch.manual_seed(0)
    fused = FusedProjection(nn.Linear(IN, 3 * OUT))
    for i, name in enumerate("qkv"):
        fused.parts[name] = AdaptedLinear(fused.linear, 6, 1.0, 5, 4, rows=slice(i * OUT, (i + 1) * OUT))
    adapters = list(fused.parts.values())
    x = torch.randn(4, 3, IN)

    def train_one_task() -> None:
        for adapter in adapters:
            adapter.reset()
        fused(x).sum().backward()
        for adapter in adapters:
            adapter.merge()
            adapter.orthogonal_to, adapter.terms = adapter.past_B, {}

    train_one_task()
    before = stored_bytes()
    for _ in range(50):
        train_one_task()
    growth = stored_bytes() - before
    factors = 50 * 3 * 4 * (IN + OUT) * 4  # tasks, adapters, merged experts, numbers of a pair, bytes
    assert abs(growth - factors) < 0.05 * factors
    delta = torch.cat([adapter.merged_delta() for adapter in adapters])
    assert len(adapters[0].merged) == 51 and torch.isfinite(delta).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pristine_weights_lie_in_a_file_and_leave_none_behind(dtype, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    weight = torch.randn(100_000).to(dtype)
    copy = file_backed_copy(weight)
    weight_before = weight.clone()
    weight.zero_()
    assert torch.equal(copy, weight_before)
    assert list(tmp_path.iterdir()) == []
    maps = Path("/proc/self/maps").read_text()
    assert f"{tmp_path}/r1p-pristine-" in maps
    del copy
    assert f"{tmp_path}/r1p-pristine-" not in Path("/proc/self/maps").read_text()


def test_a_full_disk_keeps_the_copy_in_memory_and_says_so(monkeypatch, caplog) -> None:
    def no_space(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pristine_module.tempfile, "NamedTemporaryFile", no_space)
    weight = torch.randn(10)
    assert torch.equal(file_backed_copy(weight), weight)
    assert "No space left on device" in caplog.text and tempfile.gettempdir() in caplog.text
