"""The files of CLIP models: where open_clip has them, and their tensors by the names of open_clip's modules."""

from importlib import resources
from pathlib import Path

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors.torch import load_file
from torch import nn

from r1p_dist.backbones.weights import TEMPERATURE
from r1p_dist.errors import InputError, one_line


def model_source(name: str) -> str:
    """Returns where open_clip finds a model's configuration: the name itself, or the folder of the shipped model."""
    return f"local-dir:{resources.files('r1p_dist') / 'assets' / 'tiny'}" if name == "tiny" else name


def weights_file(name: str, pretrained: str | None) -> Path | None:
    """Returns the file of a model's weights; None for random weights. A tag of a hub is downloaded if need be."""
    source = model_source(name)
    if source.startswith("local-dir:"):
        folder = Path(source.removeprefix("local-dir:"))
        found = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
        return found[0] if found else None
    if name.startswith("hf-hub:"):
        return Path(open_clip.pretrained.download_pretrained_from_hf(name.removeprefix("hf-hub:")))
    if pretrained is None:
        return None
    if Path(pretrained).is_file():
        return Path(pretrained)
    return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, pretrained)))


def hub_parts(source: str) -> dict[str, str]:
    """Returns what of a model, beside its weights, open_clip takes from a place on the hub, and these places."""
    text = (open_clip.get_model_config(source) or {}).get("text_cfg", {})
    parts = {"text tower's configuration": text.get("hf_model_name"), "tokenizer": text.get("hf_tokenizer_name")}
    is_local = source.startswith("local-dir:")  # which brings a tokenizer of its own
    return {
        part: place
        for part, place in parts.items()
        if place and not Path(place).is_dir() and not (is_local and part == "tokenizer")
    }


def map_weights(file: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the tensors of a weights file, mapped, by the names of `model` (which may be on the meta device).

    Layouts of other programs are converted as open_clip does. InputError: the file is none of safetensors or a torch
    file of tensors alone.
    """
    try:
        if file.suffix == ".safetensors":
            content = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch has an exception of its own for what it refuses to unpack
        raise InputError(f"{file}: not a safetensors file nor a torch file of tensors: {one_line(error)}") from error
    weights = content.get("state_dict", content)
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    weights = convert_state_dict(model, weights)
    if "positional_embedding" in weights:
        weights = convert_to_custom_text_state_dict(weights)
    for name in TEMPERATURE:
        if name in weights:
            weights[name] = weights[name].reshape(getattr(model, name).shape)
    weights.pop("text.transformer.embeddings.position_ids", None)
    for name, buffer in model.named_buffers():  # statistics keep the precision that they are computed in
        if name in weights:
            weights[name] = weights[name].to(buffer.dtype)
    resize_pos_embed(weights, model)
    resize_text_pos_embed(weights, model)
    return weights
