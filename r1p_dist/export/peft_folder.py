"""The updates of a run's tasks as LoRA adapters for PEFT, on the pristine model of transformers."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from r1p_dist.adapters import Dense, Factors
from r1p_dist.errors import InputError
from r1p_dist.export.finished_run import FinishedRun, TaskUpdate
from r1p_dist.export.model_card import write_card
from r1p_dist.export.part import HfModel, export_part
from r1p_dist.export.safetensors_writer import Entry, write_tensors
from r1p_dist.files import write_atomically

ALL = "all"


def write_peft(folder: Path, run: FinishedRun, dtype: torch.dtype | None, with_base: bool) -> None:
    """Writes a folder per task, `all` for the model after them, and with `with_base` the pristine model as `base`.

    dtype: of all weights; None: adapters in fp32, the base as HfModel.write has it. InputError: nothing was trained, or
    transformers cannot express the model.
    """
    model = export_part(run.config.backbone).hf_model(run)
    if not run.tasks:
        raise InputError(f"{run.path}: method={run.config.method} trained nothing; use --to hf")
    if any(isinstance(update, Dense) for task in run.tasks for update in task.updates.values()):
        raise InputError(
            f"{run.path}: method={run.config.method} leaves whole weights, and PEFT holds low-rank updates; use --to hf"
        )
    for task in run.tasks:
        _write_adapter(folder / task.folder, run, model, [task], dtype or torch.float32)
    _write_adapter(folder / ALL, run, model, run.deployed, dtype or torch.float32)
    if with_base:
        model.write(folder / "base", [], dtype)
    content = [f"- `{task.folder}`: the update of task {task.name} alone" for task in run.tasks]
    content.append(f"- `{ALL}`: the model after these tasks, the sum of {', '.join(t.name for t in run.deployed)}")
    if len(run.deployed) < len(run.tasks):
        content.append(f"\n{run.config.method} keeps one update: that of a task holds those of the tasks before it.")
    write_card(folder, run, run.deployed, "peft", _usage(model, f"FOLDER/{ALL}"), ["\n".join(content)])


def _write_adapter(
    folder: Path, run: FinishedRun, model: HfModel, tasks: Sequence[TaskUpdate], dtype: torch.dtype
) -> None:
    """Writes the sum of the tasks' updates as one adapter; a layer's rank is the number of its experts.

    PEFT has one rank and one scaling (lora_alpha / r) for all layers, and patterns for those that differ. What the
    tasks' scalings differ by within a layer goes into their B.
    """
    layers = {layer: [task.updates[layer] for task in tasks] for layer in run.places}
    ranks = {model.module(layer): sum(len(update.A) for update in updates) for layer, updates in layers.items()}
    alphas = {model.module(layer): ranks[model.module(layer)] * updates[0].scaling for layer, updates in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": model.base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
        "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(ranks),
    }
    entries = []
    for layer, updates in layers.items():
        own = ranks[model.module(layer)]
        A_shape, B_shape = (own, updates[0].A.shape[1]), (len(updates[0].B), own)
        prefix = f"base_model.model.{model.module(layer)}"
        entries.append(Entry(f"{prefix}.lora_A.weight", A_shape, dtype, partial(_joined_A, updates)))
        entries.append(Entry(f"{prefix}.lora_B.weight", B_shape, dtype, partial(_joined_B, updates)))
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", entries)
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    write_card(folder, run, tasks, "peft", _usage(model, "FOLDER"))


def _joined_A(updates: Sequence[Factors]) -> torch.Tensor:
    return torch.cat([update.A for update in updates])


def _joined_B(updates: Sequence[Factors]) -> torch.Tensor:
    return torch.cat([update.scaling / updates[0].scaling * update.B for update in updates], dim=1)


def _usage(model: HfModel, adapter: str) -> str:
    base = f'{model.model_class}.from_pretrained("{model.base_name or "BASE"}")'
    return "\n".join(
        [
            "from peft import PeftModel",
            f"from transformers import {model.model_class}",
            "",
            f"base = {base}  # the base model's own weights, as --with-base writes them",
            f'model = PeftModel.from_pretrained(base, "{adapter}")',
        ]
    )
