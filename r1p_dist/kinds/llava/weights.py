"""Models of transformers: their configuration, files and names of weights; no code of a hub is ever run."""

import functools
import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import is_flash_attn_2_available

from r1p_dist.data.stream import ASSETS
from r1p_dist.errors import InputError, one_line
from r1p_dist.kinds.llava.families import FAMILIES
from r1p_dist.kinds.llava.random_models import shape_config, shape_processor
from r1p_dist.kinds.llava.shapes import SHAPES

_DOWNLOADED = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
# Keys of a decoder's configuration that say that it is a mixture of experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


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
        return shape_config(name)
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, decoder = content["model_type"], content.get("text_config") or {}
        has_experts = any(decoder.get(key) for key in _EXPERTS)
        if kind in FAMILIES and not has_experts:
            return FAMILIES[kind].model_class.config_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise InputError(f"backbone.name={name}: its config.json cannot be used: {one_line(error)}") from error
    if has_experts:
        raise InputError(
            f"backbone.name={name}: its decoder is a mixture of experts, which transformers keeps in one weight for "
            "all of them, so there are no linears to adapt; use a dense model"
        )
    raise InputError(f"backbone.name={name}: is of type {kind}; backbone.kind=llava takes {', '.join(FAMILIES)}")


def read_processor(name: str) -> ProcessorMixin:
    """Returns a model's own tokenizer and image processor; a shape of SHAPES has the shipped tokenizer."""
    folder = model_folder(name)
    try:
        if folder is None:
            return shape_processor(name)
        # False, not the default: that asks at a terminal
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise InputError(f"backbone.name={name}: its processor cannot be used: {one_line(error)}") from error
    parts = ("tokenizer", "image_processor", "image_token")
    missing = [part for part in parts if getattr(processor, part, None) is None]
    if missing:
        raise InputError(
            f"backbone.name={name}: its processor, a {type(processor).__name__}, has no {missing[0]}; its folder "
            "needs the processor_config.json, preprocessor_config.json and tokenizer of the model"
        )
    kind = read_config(name).model_type
    family = FAMILIES[kind]
    if type(processor).__name__ not in family.processors:
        raise InputError(
            f"backbone.name={name}: its processor is a {type(processor).__name__}, a {kind} takes a "
            f"{' or '.join(family.processors)}; its folder needs the processor_config.json, preprocessor_config.json "
            "and tokenizer of the model"
        )
    unserved = family.unserved(processor)
    if unserved is not None:
        raise InputError(f"backbone.name={name}: its processor {unserved}")
    if not family.processor(processor).chat_template:
        raise InputError(f"backbone.name={name}: has no chat template; add a chat_template.jinja to its folder")
    return processor


def build_on_meta(config: PreTrainedConfig) -> nn.Module:
    """Returns a model whose parameters have no memory; its buffers are computed."""
    with torch.device("meta"):
        model = FAMILIES[config.model_type].model_class(config)
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


def set_attention(model: PreTrainedModel, implementation: str, dtype: torch.dtype) -> None:
    """Makes all towers of a model attend by one of transformers' implementations.

    InputError: one that a tower, this machine or the weights' precision does not have.
    """
    said = f"backbone.attn_implementation={implementation}"
    if implementation == "flash_attention_2":
        kind = model.config.model_type
        if not FAMILIES[kind].is_causal:  # older transformers would leave out that part of the mask
            raise InputError(f"{said}: has no mask for the tokens of a {kind}, which see later ones; leave it out")
        # without the package transformers would fetch a compiled kernel from the hub
        if not is_flash_attn_2_available():
            raise InputError(f"{said}: needs an accelerator with the package flash-attn; or leave it out for SDPA")
        if dtype not in (torch.float16, torch.bfloat16):
            raise InputError(f"{said}: needs weights in bf16; set train.precision=bf16, or leave it out for SDPA")
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise InputError(f"{said}: {one_line(error)}; leave it out") from error


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
    family, weights = FAMILIES[model.config.model_type], {}
    for file in files_of_weights(name):
        try:
            content = load_file(file)
        except Exception as error:  # safetensors has an exception of its own
            raise InputError(f"{file}: not a safetensors file: {one_line(error)}") from error
        weights |= {family.module_name(key): tensor for key, tensor in content.items()}
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
