"""Frozen weights, one tensor at a time: mapped from their file or drawn by name, and put where they are to stay.

A model is built on the meta device, so that nothing is ever allocated for weights that another rank will hold. Its file
is mapped: of a tensor only what is read is loaded, and ranks of one node share the pages.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import deepspeed
import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors.torch import load_file
from torch import nn

from r1p_dist.data.order import digest_number
from r1p_dist.errors import InputError, one_line

_TEMPERATURE = {"logit_scale": 2.6593, "logit_bias": -10.0}  # log(1 / 0.07), and SigLIP's
_EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class Placement:
    """Where weights are put, and in what precision; zero3: DeepSpeed's configuration where its stage 3 shards them."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    zero3: dict | None = None


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
    for name in _TEMPERATURE:
        if name in weights:
            weights[name] = weights[name].reshape(getattr(model, name).shape)
    weights.pop("text.transformer.embeddings.position_ids", None)
    resize_pos_embed(weights, model)
    resize_text_pos_embed(weights, model)
    return weights


def place(model: nn.Module, placement: Placement) -> None:
    """Puts the parameters of a model where they are to stay, one after another; those on the meta device are drawn.

    Under ZeRO-3 a rank keeps its part of each alone, which takes no communication.
    """
    partition = None if placement.zero3 is None else _partitioner(placement)
    parameters = list(_parameters(model))
    size = max(parameter.numel() for *_, parameter in parameters)
    # Each is on its way in the same memory: pieces that are freed in between shares would stay unused.
    whole = None if partition is None else torch.empty(size, device=placement.device, dtype=placement.dtype)
    numbers = None
    placed: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module, prefix, name, parameter in parameters:
        if id(parameter) in placed:
            module._parameters[name] = placed[id(parameter)]
            continue
        source = parameter.detach()
        if parameter.is_meta and placement.device.type != "meta":
            numbers = torch.empty(size) if numbers is None else numbers
            source = draw(module, f"{prefix}{name}", numbers[: parameter.numel()].view(parameter.shape))
        if partition is None:
            value = source.to(placement.device, placement.dtype, copy=True)
        else:
            value = whole[: parameter.numel()].view(parameter.shape).copy_(source)
        module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        if partition is not None:
            partition(module._parameters[name])
        placed[id(parameter)] = module._parameters[name]
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(placement.device)


def draw(module: nn.Module, name: str, out: torch.Tensor) -> torch.Tensor:
    """Fills `out`, fp32, with random numbers for a parameter of `module`, and returns it.

    They are a function of the parameter's whole name and its shape, so they are equal on all ranks.
    """
    own, shape = name.rpartition(".")[2], out.shape
    if own in _TEMPERATURE:
        return out.fill_(_TEMPERATURE[own])
    if type(module).__name__.endswith("Norm") or own == "bias":  # RMSNorms as well
        return out.fill_(float(own == "weight"))
    is_embedding = isinstance(module, nn.Embedding) or own == "positional_embedding"
    std = _EMBEDDING_STD if is_embedding else shape[1:].numel() ** -0.5 if len(shape) > 1 else shape[0] ** -0.5
    return out.normal_(0, std, generator=torch.Generator().manual_seed(digest_number("weights", name)))


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield module, f"{prefix}." if prefix else "", name, parameter


def _partitioner(placement: Placement) -> Callable[[nn.Parameter], None]:
    """Returns what makes a parameter one of ZeRO-3's.

    `deepspeed.zero.Init` would send every weight from rank 0 to all others; here each rank has read it already.
    """
    # Without `dtype`, which it takes for bf16 on a CPU without fp16 arithmetic; the configuration says it.
    shards = deepspeed.zero.Init(config_dict_or_path=placement.zero3)

    def partition(parameter: nn.Parameter) -> None:
        shards._convert_to_deepspeed_param(parameter)
        parameter.partition()

    return partition
