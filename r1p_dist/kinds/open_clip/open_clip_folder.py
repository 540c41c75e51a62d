"""The merged model as a folder that plain open_clip loads, as `local-dir:FOLDER` or by its weights file alone."""

import json
from functools import partial
from pathlib import Path

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer

from r1p_dist.config import BackboneConfig
from r1p_dist.export.finished_run import FinishedRun
from r1p_dist.export.model_card import write_card
from r1p_dist.export.safetensors_writer import Entry, write_tensors
from r1p_dist.files import write_atomically
from r1p_dist.kinds.open_clip.weights import model_source

WEIGHTS = "open_clip_model.safetensors"


def write_open_clip(folder: Path, run: FinishedRun, dtype: torch.dtype | None) -> None:
    """Writes weights, open_clip_config.json, the tokenizer where open_clip brings none, and the model card.

    dtype: what the weights are rounded to; None: fp32.
    """
    config, backbone = run.config.backbone, run.base.backbone
    model_cfg = model_config(config)
    weights, kept_types = run.merged_weights(run.deployed), run.base.kept_types
    # open_clip's plain CLIP class has the text tower's weights in the model itself
    is_module = model_cfg.get("custom_text") or "hf_model_name" in model_cfg["text_cfg"]
    prefix = "" if is_module else "text."
    entries = [
        Entry(
            name.removeprefix(prefix), shape, kept_types.get(name, dtype or torch.float32), partial(weights.read, name)
        )
        for name, shape in weights.shapes.items()
    ]
    write_tensors(folder / WEIGHTS, entries)
    content = {"model_cfg": model_cfg, "preprocess_cfg": backbone.preprocess}
    write_atomically(folder / "open_clip_config.json", json.dumps(content, indent=2) + "\n")
    if isinstance(backbone.tokenizer, HFTokenizer):
        backbone.tokenizer.save_pretrained(folder)
    write_card(folder, run, run.deployed, "open_clip", _usage(config))


def model_config(config: BackboneConfig) -> dict:
    """Returns open_clip's configuration of a run's backbone."""
    model_cfg = open_clip.get_model_config(model_source(config.name))
    if config.force_quick_gelu:
        model_cfg["quick_gelu"] = True
    return model_cfg


def _usage(config: BackboneConfig) -> str:
    usage = [
        "import open_clip",
        "",
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")',
        'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")',
    ]
    if config.name in open_clip.list_models():
        option = ", force_quick_gelu=True" if config.force_quick_gelu else ""
        usage += [
            "",
            "# or the weights alone; preprocessing is then open_clip's default",
            f'model = open_clip.create_model("{config.name}", pretrained="FOLDER/{WEIGHTS}"{option})',
        ]
    return "\n".join(usage)
