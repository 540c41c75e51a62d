"""What a task leaves on disk: written whole and read back the same, or one line that says what is wrong."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from r1p_dist.adapters import Dense, Factors
from r1p_dist.checkpoint import TensorFile, load_updates, save_memory, save_updates
from r1p_dist.errors import InputError

PLACES = {"one": (nn.Parameter(torch.zeros(6, 4)), slice(2, 5)), "whole": (nn.Parameter(torch.zeros(3, 2)), None)}


@pytest.fixture
def updates() -> dict[str, Factors | Dense]:
    return {
        "one": Factors(torch.randn(2, 4), torch.randn(3, 2), 1 / 3),
        "whole": Dense(nn.Parameter(torch.randn(3, 2))),
    }


def test_updates_of_both_kinds_come_back_as_they_were(updates, tmp_path: Path) -> None:
    file = tmp_path / "00-task" / "adapter.safetensors"
    save_updates(file, updates)
    found = load_updates(file, PLACES)
    assert torch.equal(found["one"].A, updates["one"].A) and torch.equal(found["one"].B, updates["one"].B)
    assert found["one"].scaling == 1 / 3 and torch.equal(found["whole"].value, updates["whole"].value)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_memory_comes_back_and_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "memory.safetensors"
    memory = {"moment": torch.randn(4, 4), "tasks": torch.tensor(2.0)}
    save_memory(file, memory)
    found = TensorFile(file)
    assert set(found) == set(memory) and all(torch.equal(found[name], memory[name]) for name in memory)
    with pytest.raises(KeyError, match="other"):
        found["other"]


def test_a_file_where_the_folder_should_be_is_one_line(updates, tmp_path: Path) -> None:
    (tmp_path / "adapters").write_text("not a folder")
    with pytest.raises(InputError, match="adapters/00-task/adapter.safetensors: cannot be written: "):
        save_updates(tmp_path / "adapters" / "00-task" / "adapter.safetensors", updates)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"one.A": torch.zeros(2, 3)}, "one has other shapes than this model's"),
        ({"one.B": torch.zeros(6, 2)}, "one has other shapes than this model's"),
        ({"whole.value": torch.zeros(2, 2)}, "whole has other shapes than this model's"),
        ({"one.A": torch.full((2, 4), torch.inf)}, "one holds a value that is not finite"),
        ({"other.A": torch.zeros(2, 4)}, "holds other layers than this model adapts, for example other.A"),
        ({"one.scaling": None}, "holds other layers than this model adapts, for example one.scaling is none"),
    ],
)
def test_what_does_not_fit_the_model_is_named(updates, tmp_path: Path, change: dict, reason: str) -> None:
    file = tmp_path / "adapter.safetensors"
    save_updates(file, updates)
    tensors = {name: tensor for name, tensor in (load_file(file) | change).items() if tensor is not None}
    save_file(tensors, file)
    with pytest.raises(InputError, match=reason):
        load_updates(file, PLACES)
