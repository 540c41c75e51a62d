"""What a task leaves on disk: its merged experts as safetensors with a JSON beside them."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from r1p_dist.adapters import LowRankLinear
from r1p_dist.files import write_atomically


def save_adapter(folder: Path, adapters: list[LowRankLinear], facts: dict) -> None:
    """Writes the update that each adapter merged last: `<name>.A` (k, in), `<name>.B` (out, k) fp32, and facts with
    the scaling.

    The tensor file comes first and the JSON last, both by rename: a folder with adapter.json is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for adapter in adapters:
        update = adapter.merged[-1]
        tensors[f"{adapter.name}.A"] = update.A.cpu().contiguous()
        tensors[f"{adapter.name}.B"] = update.B.cpu().contiguous()
    temporary = folder / f".adapter.safetensors.{os.getpid()}"
    save_file(tensors, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(folder / "adapter.safetensors")
    facts = {**facts, "scaling": adapters[0].scaling, "layers": [adapter.name for adapter in adapters]}
    write_atomically(folder / "adapter.json", json.dumps(facts, indent=2) + "\n")
