"""The file of moments: of each layer's input the leading directions of its second moment, and how much the rest has.

C (in, in) is kept as trace * F F^T + rest * I, F (in, k): the `keep` largest eigenvalues exactly, all smaller ones as
their mean, so that C's trace stays. `<layer>.factor` is F in fp16, `<layer>.trace` and `<layer>.rest` are () fp32.
Metadata: `backbone`, which weights it is about (`weights_identity`), `layers`, which layers read each input, and
`source`, what it was measured on.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from r1p_dist.data.stream import ASSETS
from r1p_dist.errors import InputError


def write_moments(
    path: Path, moments: Mapping[str, torch.Tensor], layers: Mapping[str, Sequence[str]], keep: int, facts: dict
) -> None:
    """Writes moments (in, in) by layer. keep: directions of each. layers: by the same names, all that read an input.

    facts: `backbone` and `source`. InputError: it cannot be written.
    """
    tensors = {}
    for layer, moment in moments.items():
        for part, value in compress(moment, keep).items():
            tensors[f"{layer}.{part}"] = value
    metadata = {key: json.dumps(value) for key, value in {**facts, "layers": dict(layers)}.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written: {error}") from error


def compress(moment: torch.Tensor, keep: int) -> dict[str, torch.Tensor]:
    """Returns `factor`, `trace` and `rest` of a moment (in, in)."""
    values, vectors = torch.linalg.eigh(moment.double())
    values, trace = values.clamp(min=0), moment.double().trace()
    small, large = values[: max(0, len(values) - keep)], values[-keep:]
    rest = small.mean() if len(small) else torch.zeros_like(trace)
    factor = vectors[:, -keep:] * ((large - rest) / (trace if trace else 1)).clamp(min=0).sqrt()
    return {"factor": factor.half().contiguous(), "trace": trace.float(), "rest": rest.float()}


class MomentFile:
    """The moments of a file, each read and made whole when it is asked for."""

    def __init__(self, name: str) -> None:
        """name: a path, or that of a shipped backbone that has such a file. InputError: it is none."""
        shipped = ASSETS / "moments" / f"{name}.safetensors"
        self.path = shipped if shipped.is_file() else Path(name)
        if not self.path.is_file():
            there = ", ".join(sorted(file.stem for file in ASSETS.glob("moments/*.safetensors")))
            raise InputError(f"{name}: no such file of moments; `r1p moments` makes one, shipped is that of {there}")
        try:
            self._file = safe_open(self.path, "pt")
            metadata = self._file.metadata() or {}
            self.backbone, layers = (json.loads(metadata[key]) for key in ("backbone", "layers"))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(f"{self.path}: is no file of `r1p moments`: {error!r}") from error
        self._key_of = {name: key for key, names in layers.items() for name in names}

    def check(self, backbone: Mapping[str, Any]) -> None:
        """Raises InputError where the moments are those of other weights."""
        if self.backbone["sha256"] != backbone["sha256"]:
            raise InputError(
                f"{self.path}: measured on other weights (backbone.name={self.backbone['name']}, "
                f"pretrained={self.backbone['pretrained']}) than those of this run ({backbone['name']}, "
                f"{backbone['pretrained']}); measure them with `r1p moments`"
            )

    def moment(self, layer: str) -> torch.Tensor:
        """Returns the moment (in, in) fp32 of the input that a layer reads. InputError: the file has none of it."""
        if layer not in self._key_of:
            raise InputError(f"{self.path}: has no moment of {layer}'s input; measure it with the run's `targets`")
        key = self._key_of[layer]
        factor, trace, rest = (self._file.get_tensor(f"{key}.{part}") for part in ("factor", "trace", "rest"))
        factor = factor.float()
        return trace * factor @ factor.T + rest * torch.eye(len(factor))
