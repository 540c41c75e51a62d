"""What a task leaves on disk: its merged experts as safetensors with a JSON beside them."""

import json
from pathlib import Path

import torch

from r1p_dist.adapters import Factors, LowRankLinear
from r1p_dist.checkpoint.folders import read_tensors, tensor_file
from r1p_dist.errors import InputError
from r1p_dist.files import write_atomically


def save_adapter(folder: Path, adapters: list[LowRankLinear], facts: dict) -> None:
    """Writes the update that each adapter merged last: `<name>.A` (k, in), `<name>.B` (out, k) fp32, and facts with
    the scaling.

    The tensor file comes first and the JSON last, both by rename: a folder with adapter.json is complete.
    """
    tensors: dict[str, torch.Tensor] = {}
    for adapter in adapters:
        update = adapter.merged[-1]
        tensors[f"{adapter.name}.A"] = update.A
        tensors[f"{adapter.name}.B"] = update.B
    write_atomically(folder / "adapter.safetensors", tensor_file(tensors))
    facts = {**facts, "scaling": adapters[0].scaling, "layers": [adapter.name for adapter in adapters]}
    write_atomically(folder / "adapter.json", json.dumps(facts, indent=2) + "\n")


def load_adapter(path: Path, adapters: list[LowRankLinear]) -> list[Factors]:
    """Returns the update of each adapter from an adapter.safetensors. InputError: no such file, or of other layers."""
    tensors = read_tensors(path)
    expected = {f"{adapter.name}.{factor}" for adapter in adapters for factor in "AB"}
    if odd := sorted(expected ^ tensors.keys()):
        raise InputError(f"{path}: holds other layers than this model adapts, for example {odd[0]}")
    updates = []
    for adapter in adapters:
        A, B = tensors[f"{adapter.name}.A"], tensors[f"{adapter.name}.B"]
        if A.shape[1] != adapter.in_features or B.shape != (adapter.out_features, len(A)):
            raise InputError(f"{path}: {adapter.name} has {tuple(A.shape)} and {tuple(B.shape)}, of another model")
        device = adapter.linear.weight.device
        updates.append(Factors(A.to(device), B.to(device), adapter.scaling))
    return updates
