"""The streaming safetensors writer against safetensors' own reader."""

import struct
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from r1p_dist.errors import InputError
from r1p_dist.export.safetensors_writer import Entry, write_tensors


def entry(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Entry:
    return Entry(name, tuple(tensor.shape), dtype or tensor.dtype, lambda: tensor)


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.randn(3).bfloat16(),  # 6 bytes: what comes behind must be aligned all the same
        "matrix": torch.randn(5, 3),
        "transposed": torch.randn(3, 4).T,
        "half": torch.randn(2, 2).half(),
        "number": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "ünïcode": torch.ones(1),
    }
    write_tensors(tmp_path / "x.safetensors", [entry(name, tensor) for name, tensor in tensors.items()])
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    (length,) = struct.unpack("<Q", (tmp_path / "x.safetensors").read_bytes()[:8])
    assert length % 8 == 0


def test_tensors_are_rounded_to_the_entrys_type(tmp_path: Path) -> None:
    tensor = torch.randn(64, 64)
    write_tensors(tmp_path / "x.safetensors", [entry("x", tensor, torch.bfloat16)])
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], tensor.bfloat16())


def test_each_tensor_is_read_in_its_turn(tmp_path: Path) -> None:
    turns: list[str] = []

    def read(name: str) -> torch.Tensor:
        turns.append(name)
        return torch.zeros(2)

    write_tensors(tmp_path / "x.safetensors", [Entry(name, (2,), torch.float32, partial(read, name)) for name in "abc"])
    assert turns == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e5, torch.float16, "w: holds a value that is not finite as F16; use --dtype bf16 or fp32"),
        (float("nan"), torch.float32, "w: holds a value that is not finite as F32$"),
    ],
)
def test_what_is_not_finite_is_refused_and_nothing_is_left(tmp_path: Path, value, dtype, message) -> None:
    tensors = [entry("v", torch.ones(3)), entry("w", torch.tensor([1.0, value]), dtype)]
    with pytest.raises(InputError, match=message):
        write_tensors(tmp_path / "x.safetensors", tensors)
    assert not list(tmp_path.iterdir())


def test_a_tensor_of_another_shape_than_announced_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shape"):
        write_tensors(tmp_path / "x.safetensors", [Entry("x", (3,), torch.float32, lambda: torch.zeros(2))])
