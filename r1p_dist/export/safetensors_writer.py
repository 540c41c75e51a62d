"""A safetensors file written tensor after tensor: the header with all offsets first, as shapes are known beforehand.

The format: https://huggingface.co/docs/safetensors (8 bytes with the header's length, a JSON header, then the tensors).
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from r1p_dist.errors import InputError
from r1p_dist.export.formats import TYPE_NAMES
from r1p_dist.files import atomic_file

DTYPES = {name: getattr(torch, torchs) for name, torchs in TYPE_NAMES.items()}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_ALIGNMENT = 8  # bytes that the header's length is a multiple of


class Entry(NamedTuple):
    """A tensor to write; `read` computes it when its turn comes, and what it returns is rounded to `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def write_tensors(path: Path, entries: Sequence[Entry]) -> None:
    """Writes the tensors as a safetensors file; in memory there is never more than one.

    InputError: a value that is not finite once it is rounded.
    """
    # wide numbers first, so that each begins at a multiple of its size
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    with atomic_file(path) as file:
        file.write(_header(entries))
        for entry in entries:
            tensor = _rounded(entry)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    offset = 0
    for entry in entries:
        if entry.name in header:
            raise ValueError(f"two tensors are called {entry.name}")
        end = offset + math.prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    return len(content).to_bytes(8, "little") + content


def _rounded(entry: Entry) -> torch.Tensor:
    tensor = entry.read().to(entry.dtype).contiguous()
    if tuple(tensor.shape) != tuple(entry.shape):
        raise ValueError(f"{entry.name} has shape {tuple(tensor.shape)}, not {tuple(entry.shape)} as announced")
    if tensor.numel() and not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        remedy = "; use --dtype bf16 or fp32" if entry.dtype is torch.float16 else ""
        raise InputError(f"{entry.name}: holds a value that is not finite as {_NAMES[entry.dtype]}{remedy}")
    return tensor
