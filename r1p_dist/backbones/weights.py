"""Frozen weights, one tensor at a time: mapped from their file or drawn by name, and put where they are to stay.

A model is built on the meta device, so that nothing is ever allocated for weights that another rank will hold. Its file
is mapped: of a tensor only what is read is loaded, and ranks of one node share the pages.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from r1p_dist.data.order import digest_number

TEMPERATURE = {"logit_scale": 2.6593, "logit_bias": -10.0}  # log(1 / 0.07), and SigLIP's
_EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class Placement:
    """Where weights are put, and in what precision; zero3: DeepSpeed's configuration where its stage 3 shards them."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    zero3: dict | None = None


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
            if placement.device.type != "meta":  # nothing else has its values
                module._buffers[name] = buffer.to(placement.device)


def draw(module: nn.Module, name: str, out: torch.Tensor) -> torch.Tensor:
    """Fills `out`, fp32, with random numbers for a parameter of `module`, and returns it.

    They are a function of the parameter's whole name and its shape, so they are equal on all ranks.
    """
    own, shape = name.rpartition(".")[2], out.shape
    if own in TEMPERATURE:
        return out.fill_(TEMPERATURE[own])
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
    import deepspeed  # takes seconds, and one rank alone needs none of it

    # Without `dtype`, which it takes for bf16 on a CPU without fp16 arithmetic; the configuration says it.
    shards = deepspeed.zero.Init(config_dict_or_path=placement.zero3)

    def partition(parameter: nn.Parameter) -> None:
        shards._convert_to_deepspeed_param(parameter)
        parameter.partition()

    return partition
