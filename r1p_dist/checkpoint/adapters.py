"""What a task leaves on disk: its updates by layer, as safetensors with a JSON beside them, and the method's memory."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from r1p_dist.adapters import Dense, Factors, Update
from r1p_dist.distributed import agree, gather_bytes, gathered, rank, shaped_from_rank
from r1p_dist.errors import InputError
from r1p_dist.files import sync, write_atomically
from r1p_dist.run_files import FACTS_FILE

Places = Mapping[str, tuple[nn.Parameter, slice | None]]


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, read when they are asked for, and the facts beside them.

    InputError: it is none.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, "pt")
            self._names = set(self._file.keys())
            self.facts: dict[str, str] = self._file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: cannot be read as safetensors: {error}") from error

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_updates(path: Path, updates: Mapping[str, Update]) -> None:
    """Writes a stage's updates: `<layer>.A` (k, in), `<layer>.B` (out, k), `<layer>.scaling` (), or `<layer>.value`,
    fp32; a collective. InputError: it cannot be written.
    """
    tensors = tensors_of(updates)
    agree(lambda: write_tensors(path, tensors))


def tensors_of(updates: Mapping[str, Update]) -> dict[str, torch.Tensor]:
    """Returns updates by the names that they have in a file, dense ones on rank 0 alone; a collective under ZeRO-3."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, update in updates.items():
        if isinstance(update, Dense):
            with gathered([update.value]):
                if rank() == 0:
                    tensors[f"{layer}.value"] = update.value.detach().float().cpu().clone()
            continue
        tensors[f"{layer}.A"], tensors[f"{layer}.B"] = update.A, update.B
        tensors[f"{layer}.scaling"] = torch.tensor(update.scaling, dtype=torch.float64)
    return tensors


def save_memory(path: Path, memory: Mapping[str, torch.Tensor]) -> None:
    """Writes what a method keeps for later stages, each tensor from the first rank that gives it; a collective.

    InputError: it cannot be written.
    """
    names = [json.loads(content) for content in gather_bytes(json.dumps(sorted(memory)).encode())]
    owners = {name: owner for owner in reversed(range(len(names))) for name in names[owner]}
    tensors = {}
    for name in sorted(owners):
        tensor = memory.get(name)
        if owners[name] != 0:
            tensor = shaped_from_rank(tensor, owners[name], "cpu")
        if rank() == 0:
            tensors[name] = tensor.detach().float()
    agree(lambda: write_tensors(path, tensors))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all. facts: what stands beside them. InputError: it cannot be."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_host, partial, None if facts is None else dict(facts))
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        raise InputError(f"{path}: cannot be written: {error}") from error


def write_facts(
    folder: Path, updates: Mapping[str, Update], facts: Mapping[str, Any], drift: Mapping[str, float] | None = None
) -> None:
    """Writes adapter.json, which says that the folder is complete: facts, and of each layer rank and scaling.

    drift: of some layers, as of `Drift`.
    """
    layers: dict[str, dict[str, Any]] = {
        name: {"dense": True} if isinstance(update, Dense) else {"rank": len(update.A), "scaling": update.scaling}
        for name, update in updates.items()
    }
    for name, value in (drift or {}).items():
        layers[name]["drift"] = value
    write_atomically(folder / FACTS_FILE, json.dumps({**facts, "layers": layers}, indent=2) + "\n")


def load_updates(path: Path, places: Places, device: torch.device | None = None) -> dict[str, Update]:
    """Returns the updates of an adapter.safetensors by layer, those that are low-rank on `device`.

    places: of each layer its weight and rows. InputError: no such file, or of other layers, or not finite.
    """
    return updates_in(TensorFile(path), places, str(path), device)


def updates_in(
    tensors: Mapping[str, torch.Tensor], places: Places, path: str, device: torch.device | None = None
) -> dict[str, Update]:
    """Returns updates from what `tensors_of` gave; the rest as of `load_updates`."""
    found: dict[str, Update] = {}
    expected = set()
    for layer, (weight, rows) in places.items():
        shape = getattr(weight, "ds_shape", weight.shape)
        if f"{layer}.value" in tensors:
            expected.add(f"{layer}.value")
            update: Update = Dense(tensors[f"{layer}.value"])
            fits = update.value.shape == shape
        else:
            names = [f"{layer}.{part}" for part in ("A", "B", "scaling")]
            expected.update(names)
            if missing := [name for name in names if name not in tensors]:
                raise InputError(f"{path}: holds other layers than this model adapts, for example {missing[0]} is none")
            A, B, scaling = (tensors[name] for name in names)
            out = shape[0] if rows is None else rows.stop - rows.start
            fits = A.dim() == B.dim() == 2 and A.shape == (B.shape[1], shape[1]) and len(B) == out
            update = Factors(A.to(device or A.device), B.to(device or B.device), float(scaling))
        if not fits:
            raise InputError(f"{path}: {layer} has other shapes than this model's")
        if not all(value.isfinite().all() for value in update if isinstance(value, torch.Tensor)):
            raise InputError(f"{path}: {layer} holds a value that is not finite; train the task again")
        found[layer] = update
    if odd := sorted(tensors.keys() - expected):
        raise InputError(f"{path}: holds other layers than this model adapts, for example {odd[0]}")
    return found
