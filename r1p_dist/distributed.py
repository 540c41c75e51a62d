"""The process group: rank and size, sums over ranks, a gather with gradient, and access to ZeRO-3's parameters."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sums the tensor over all ranks in place and returns it; on one rank nothing happens."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return sum_over_ranks(tensor.clone())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return sum_over_ranks(gradient.clone())


def sum_over_ranks_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the sum over ranks; its backward sums the gradients of all ranks' losses."""
    return _SumOverRanks.apply(tensor) if world_size() > 1 else tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(gathered, tensor.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        # gloo has no reduce-scatter: sum all, keep this rank's block
        return sum_over_ranks(gradient.contiguous()).chunk(world_size())[rank()]


def gather_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenates the (n, …) tensors of all ranks, in rank order; n must be equal on every rank.

    The backward sums every rank's gradient for this rank's block, so with a loss that is averaged over ranks (as ZeRO
    does with gradients) the result is the gradient of the mean of all ranks' losses.
    """
    return _Gather.apply(tensor) if world_size() > 1 else tensor


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenates the (n, …) tensors of all ranks without gradient."""
    with torch.no_grad():
        return gather_with_gradient(tensor)


def gathered(parameters: Iterable[torch.nn.Parameter], modify: bool = False) -> AbstractContextManager:
    """Makes the full values of ZeRO-3's sharded parameters readable inside the context; a collective.

    With `modify`, rank 0's values inside the context become the new ones on every rank. Other parameters are left
    alone.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if modify else None)


def drop_whole_copy(parameter: torch.nn.Parameter) -> None:
    """Drops the whole copy that ZeRO-3 may hold of a parameter beside its shards, as it does of small ones.

    To be called after the shard was changed: the next use gathers the new values. Other parameters are left alone.
    """
    if hasattr(parameter, "ds_id") and parameter.ds_status.name == "AVAILABLE":
        parameter.partition()
