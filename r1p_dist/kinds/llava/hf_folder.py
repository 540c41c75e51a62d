"""The merged model as a folder like the base model's: the same files, with the same names of weights in them."""

import json
import re
import shutil
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path

import torch

from r1p_dist.errors import InputError
from r1p_dist.export.finished_run import FinishedRun, TaskUpdate
from r1p_dist.export.merged import MergedWeights
from r1p_dist.export.model_card import write_card
from r1p_dist.export.safetensors_writer import DTYPES, Entry, write_tensors
from r1p_dist.files import write_atomically
from r1p_dist.kinds.llava.frozen_weights import LlavaWeights
from r1p_dist.kinds.llava.weights import model_folder

_WEIGHTS = "model.safetensors"
_BESIDE = ("*.json", "*.jinja", "*.model", "*.txt")  # configuration, processor, tokenizer, chat template
_ABOUT_WEIGHTS = r"\.(safetensors|bin)\."  # an index of the base's files, or a hash of one
_DTYPE_KEYS = {"dtype", "torch_dtype"}  # in config.json; the older one too
_USAGE = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")
# the run was measured with generate(…, do_sample=False)"""


class HfLlava:
    """An HfModel of one of the classes of FAMILIES; weights keep the type they have in the base's files."""

    model_class = "AutoModelForImageTextToText"

    def __init__(self, run: FinishedRun):
        self._run, self._base = run, run.base
        name = run.config.backbone.name
        self._folder = model_folder(name)
        self.base_name = None if name == "tiny" or Path(name).is_dir() else name

    def module(self, layer: str) -> str:
        weight, rows = self._run.places[layer]
        if rows is not None and rows.stop - rows.start < self._base.shapes[weight][0]:
            raise InputError(
                f"{self._run.path}: {layer} is a part of {weight}, a fused projection, of which PEFT adapts all rows "
                "at once; use --to hf"
            )
        return self._base.backbone.family.module_name(weight).removesuffix(".weight")

    def write(self, folder: Path, tasks: Sequence[TaskUpdate], dtype: torch.dtype | None) -> None:
        folder.mkdir(exist_ok=True)
        _write_weights(folder, self._base, self._run.merged_weights(tasks), dtype)
        for path in _files_beside(self._folder):
            shutil.copyfile(path, folder / path.name)
        if dtype is not None:
            _set_dtype(folder / "config.json", dtype)
        self._name_the_end(folder / "generation_config.json")
        write_card(folder, self._run, tasks, "transformers", _USAGE)

    def _name_the_end(self, path: Path) -> None:
        """Names the token that ended the run's answers where the base model names none: its tokenizer's."""
        backbone = self._base.backbone
        given = backbone.model.generation_config
        if given.eos_token_id is None:
            content = given.to_diff_dict() | {"eos_token_id": backbone.processor.tokenizer.eos_token_id}
            _write_json(path, content)


def _write_weights(folder: Path, base: LlavaWeights, weights: MergedWeights, dtype: torch.dtype | None) -> None:
    """Writes the base's files again, and an index where a loader needs one."""
    total_size, index = 0, {}
    for file, names in base.files.items():
        entries = [_entry(name, base, weights, dtype) for name in names]
        write_tensors(folder / file, entries)
        total_size += sum(prod(entry.shape) * entry.dtype.itemsize for entry in entries)
        index |= dict.fromkeys(names, file)
    if list(base.files) != [_WEIGHTS]:
        content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(index.items()))}
        _write_json(folder / f"{_WEIGHTS}.index.json", content)


def _entry(name: str, base: LlavaWeights, weights: MergedWeights, dtype: torch.dtype | None) -> Entry:
    dtype = dtype or base.read(name).dtype
    if dtype not in DTYPES.values():
        raise InputError(f"backbone: {name} is of type {dtype} in its file; choose one of --dtype {', '.join(DTYPES)}")
    return Entry(name, tuple(weights.shapes[name]), dtype, partial(weights.read, name))


def _files_beside(folder: Path) -> list[Path]:
    """Returns what a loader needs beside the weights."""
    paths = [path for pattern in _BESIDE for path in sorted(folder.glob(pattern))]
    return [path for path in paths if not re.search(_ABOUT_WEIGHTS, path.name)]


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Names the weights' type in a config.json: a loader takes it for the model, and for a part where a part has it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    for part in [config, *(part for part in config.values() if isinstance(part, dict))]:
        part |= dict.fromkeys(_DTYPE_KEYS & part.keys(), name)
    if not _DTYPE_KEYS & config.keys():
        config["dtype"] = name
    _write_json(path, config)


def _write_json(path: Path, content: dict) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")
