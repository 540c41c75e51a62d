"""The file of moments: a sketch of the second moment of each layer's input, and of the gradients at its output.

`<layer>.factor` (in, k) fp16 times the root of `<layer>.trace` () is the input's factor, `<layer>.rest` () its rest;
`<layer>.gradient.factor` (out, k) and so on those of the gradients. Metadata: `backbone`, which weights it is about
(`weights_identity`), `layers`, which layers read each input, and `source`, what it was measured on.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from r1p_dist.data.stream import ASSETS
from r1p_dist.errors import InputError
from r1p_dist.files import write_atomically
from r1p_dist.moments.sketch import Sketch


def write_moments(
    path: Path,
    moments: Mapping[str, torch.Tensor],
    gradients: Mapping[str, torch.Tensor],
    layers: Mapping[str, Sequence[str]],
    keep: int,
    facts: dict,
    sketches: Mapping[str, Sketch] = MappingProxyType({}),
) -> None:
    """Writes moments (in, in) by layer and of gradients (out, out). keep: directions of each.

    layers: by the names of `moments`, all that read an input. facts: `backbone` and `source`. sketches: those of wide
    ones, as `InputMoments` has them. InputError: it cannot be written.
    """
    wholes = {**moments, **{f"{name}.gradient": moment for name, moment in gradients.items()}}
    tensors = {}
    for layer, sketch in {**{name: Sketch.of(moment, keep) for name, moment in wholes.items()}, **sketches}.items():
        trace = sketch.trace()
        factor = sketch.factor / trace.sqrt() if trace else sketch.factor  # fp16 has no very large or small numbers
        tensors |= {f"{layer}.factor": factor.half(), f"{layer}.trace": trace, f"{layer}.rest": sketch.rest}
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    metadata = {key: json.dumps(value) for key, value in {**facts, "layers": dict(layers)}.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(tensors, metadata))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}") from error


class MomentFile:
    """The moments of a file, each read when it is asked for."""

    def __init__(self, name: str) -> None:
        """name: a path, or that of a shipped backbone that has such a file. InputError: it is none."""
        shipped = ASSETS / "moments" / f"{name}.safetensors"
        self.path = shipped if shipped.is_file() else Path(name)
        if not self.path.is_file():
            there = ", ".join(sorted(file.stem for file in ASSETS.glob("moments/*.safetensors")))
            raise InputError(
                f"{name}: no such file of moments; `r1p moments` makes one (--noise without any data), shipped is that "
                f"of {there}"
            )
        try:
            self._file = safe_open(self.path, "pt")
            metadata = self._file.metadata() or {}
            self.backbone, layers = (json.loads(metadata[key]) for key in ("backbone", "layers"))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(f"{self.path}: is no file of `r1p moments`: {error!r}") from error
        self._names = set(self._file.keys())
        self._key_of = {name: key for key, names in layers.items() for name in names}

    def check(self, backbone: Mapping[str, Any], layers: Iterable[str], with_gradients: bool) -> None:
        """Raises InputError where the moments are those of other weights, or the file has none of one of the layers.

        with_gradients: those of the gradients must be there too. For every rank before a stage, since a rank then reads
        only those of its own layers.
        """
        if self.backbone["sha256"] != backbone["sha256"]:
            raise InputError(
                f"{self.path}: measured on other weights (backbone.name={self.backbone['name']}, "
                f"pretrained={self.backbone['pretrained']}) than those of this run ({backbone['name']}, "
                f"{backbone['pretrained']}); measure them with `r1p moments` (--noise needs no data)"
            )
        for layer in layers:
            if layer not in self._key_of:
                raise InputError(f"{self.path}: has no moment of {layer}'s input; measure it with the run's `targets`")
            if with_gradients and f"{layer}.gradient.rest" not in self._names:
                raise InputError(
                    f"{self.path}: has no moment of the gradients at {layer}'s output; measure it again with "
                    "`r1p moments` and the run's `targets`"
                )

    def sketch(self, layer: str) -> Sketch:
        """Returns the moment of the input that a layer reads; `check` says whether there is one."""
        return self._read(self._key_of[layer])

    def gradient(self, layer: str) -> Sketch:
        """Returns the moment of the gradients at a layer's output; `check` says whether there is one."""
        return self._read(f"{layer}.gradient")

    def _read(self, key: str) -> Sketch:
        factor, trace, rest = (self._file.get_tensor(f"{key}.{part}") for part in ("factor", "trace", "rest"))
        return Sketch(trace.sqrt() * factor.float(), rest)
