"""LLaVA models of transformers: their configuration, files and names of weights; no code of a hub is ever run."""

import functools
import json
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from r1p_dist.data.stream import ASSETS
from r1p_dist.errors import InputError, one_line
from r1p_dist.kinds.llava.shapes import SHAPES

FAMILIES: dict[str, type[nn.Module]] = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
}
_DOWNLOADED = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
# Names of LLaVA's files as they were first published, and those of transformers' modules now.
_RENAMED = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)


@functools.cache  # a hub is asked once
def model_folder(name: str) -> Path | None:
    """Returns where a model's files lie; None for one of SHAPES. A name of a hub is downloaded if need be.

    InputError: neither a folder nor a hub's name that can be had.
    """
    if name == "tiny":
        return ASSETS / "tiny_llava"
    if name in SHAPES:
        return None
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=_DOWNLOADED))
    except Exception as error:  # the hub's client raises many kinds
        known = ", ".join(["tiny", *SHAPES])
        raise InputError(
            f"backbone.name={name}: neither a folder nor a model of the hub that can be had: {one_line(error)}; known "
            f"without a hub: {known}"
        ) from error


def read_config(name: str) -> PreTrainedConfig:
    """Returns a model's configuration. InputError: not one of FAMILIES, or code of its own."""
    folder = model_folder(name)
    if folder is None:
        # vocabulary and image token are those of the shipped tokenizer's model, which serves these shapes
        config = LlavaConfig(text_config={"model_type": "llama", **SHAPES[name]}, tie_word_embeddings=False)
        config.image_token_index = config.image_token_id = read_config("tiny").image_token_id
        return config
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        if kind in FAMILIES:
            return FAMILIES[kind].config_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"backbone.name={name}: its config.json cannot be used: {one_line(error)}") from error
    raise InputError(f"backbone.name={name}: is of type {kind}; backbone.kind=llava takes {', '.join(FAMILIES)}")


def read_processor(name: str) -> ProcessorMixin:
    """Returns a model's own tokenizer and image processor; a shape of SHAPES has the shipped tokenizer."""
    folder = model_folder(name)
    if folder is not None:
        try:
            # False, not the default: that asks at a terminal
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"backbone.name={name}: its processor cannot be used: {one_line(error)}") from error
        if not processor.chat_template:
            raise InputError(f"backbone.name={name}: has no chat template; add a chat_template.jinja to its folder")
        return processor
    tiny, config = read_processor("tiny"), read_config(name)
    size = config.vision_config.image_size
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tiny.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=tiny.chat_template,
        num_additional_image_tokens=1,
    )


def build_on_meta(config: PreTrainedConfig) -> nn.Module:
    """Returns a model whose parameters have no memory; its buffers are computed."""
    with torch.device("meta"):
        model = FAMILIES[config.model_type](config)
    part = {}  # module -> the innermost of transformers' models that it is in; outer ones come first
    for outer in model.modules():
        if isinstance(outer, PreTrainedModel):
            part |= dict.fromkeys(outer.modules(), outer)
    for module, owner in part.items():
        buffers = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in buffers:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if buffers:
            owner._init_weights(module)  # rotary frequencies and positions: functions of the configuration
    model.tie_weights()
    return model


def files_of_weights(name: str) -> list[Path]:
    """Returns a model's safetensors files; none where a folder has no weights at all, which are then drawn.

    InputError: weights of another kind, or an index of files that are not there.
    """
    folder = model_folder(name)
    if folder is None:
        return []
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        pickled = [file.name for suffix in ("bin", "pt", "pth") for file in folder.glob(f"*.{suffix}")]
        if pickled and not files:
            raise InputError(f"backbone.name={name}: has {pickled[0]} and no *.safetensors; pickles are never read")
        return files
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: is no index of weights: {error}") from error
    files = [folder / Path(name).name for name in names]
    for file in files:
        if not file.is_file():
            raise InputError(f"{index}: names {file.name}, which is missing; download the model again")
    return files


def map_weights(name: str, model: nn.Module) -> bool:
    """Puts the mapped tensors of a model's files in the place of its meta parameters; returns whether there are files.

    InputError: a file that is damaged, weights that are missing, unknown, or of another shape.
    """
    weights: dict[str, torch.Tensor] = {}
    for file in files_of_weights(name):
        try:
            content = load_file(file)
        except Exception as error:  # safetensors has an exception of its own
            raise InputError(f"{file}: not a safetensors file: {one_line(error)}") from error
        weights |= {module_name(key): tensor for key, tensor in content.items()}
    if not weights:
        return False
    expected = {key: parameter.shape for key, parameter in model.named_parameters()}  # tied weights once
    tied = model.state_dict().keys() - expected.keys()
    wrong = sorted(expected.keys() - weights.keys()) or sorted(weights.keys() - expected.keys() - tied)
    if wrong:
        what = "lacks" if wrong[0] in expected else "has the unknown"
        raise InputError(f"backbone.name={name}: its files do not fit its config.json: {what} {wrong[0]}")
    for key, shape in expected.items():
        if weights[key].shape != shape:
            raise InputError(
                f"backbone.name={name}: {key} has the shape {tuple(weights[key].shape)} in its file, "
                f"{tuple(shape)} by its config.json"
            )
    model.load_state_dict({key: weights[key] for key in expected}, strict=False, assign=True)
    model.tie_weights()
    return True


def module_name(name: str) -> str:
    """Returns how a weight of a model's files is called in transformers' module."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name
