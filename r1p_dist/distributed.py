"""The process group: rank and size, sums over ranks, a gather with gradient, and access to ZeRO-3's parameters.

Every collective of this project is called here, with tensors on a device that the backend serves: nccl knows none of
the CPU. Callers may hold theirs anywhere.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r1p_dist.errors import InputError

# The second name is that of torch before 2.14, which warns of it.
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def collective_device() -> torch.device:
    """Returns where the process group's backend wants tensors that do not belong to the model."""
    served = {device.type for device in dist.group.WORLD._device_types}
    return torch.device("cpu") if "cpu" in served else torch.accelerator.current_accelerator()


def _to_backend(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor itself, or a copy on a device that the backend serves."""
    served = {device.type for device in dist.group.WORLD._device_types}
    return tensor if tensor.device.type in served else tensor.to(collective_device())


def _bring_back(tensor: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
    """Gives a tensor the values of what was sent in its place."""
    return tensor if sent is tensor else tensor.copy_(sent)


@contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """Makes this process rank 0 of `count` that are not there: collectives send nothing.

    A gather returns this rank's values for each rank, a sum or a mean of them is what this rank gave.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # makes the backend known, too

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        end_process_group()


def end_process_group() -> None:
    """Ends the process group, and what DeepSpeed knows of it, so that another can be made in this process."""
    import deepspeed

    if deepspeed.comm.comm.cdb is None:
        dist.destroy_process_group()
    else:
        deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None


def owner(number: int) -> int:
    """Returns the rank that keeps what is large of the layer with this number."""
    return number % world_size()


def is_faked() -> bool:
    """Whether the other ranks are not there, as in `fake_ranks`."""
    return is_distributed() and dist.get_backend() == "fake"


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sums the tensor over all ranks in place and returns it; on one rank nothing happens."""
    if world_size() > 1:
        sent = _to_backend(tensor)
        dist.all_reduce(sent)
        _bring_back(tensor, sent)
    return tensor


def sum_on_rank(tensor: torch.Tensor, where: int) -> torch.Tensor:
    """Sums the tensor over all ranks in place, on one rank alone, and returns it; other ranks' values are undefined."""
    if world_size() > 1:
        sent = _to_backend(tensor)
        dist.reduce(sent, where)
        _bring_back(tensor, sent)
    return tensor


def sum_on_first_rank(tensor: torch.Tensor) -> torch.Tensor:
    """Sums the tensor over all ranks in place, on rank 0 alone, and returns it; other ranks' values are undefined."""
    return sum_on_rank(tensor, 0)


class StartedSum:
    """A sum over ranks, in place, on its way while something else is computed."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self._sent = tensor, _to_backend(tensor)
        self._work = dist.all_reduce(self._sent, async_op=True)

    def wait(self) -> None:
        """Makes the sum readable; on an accelerator the host goes on at once."""
        self._work.wait()
        _bring_back(self._tensor, self._sent)


def start_sum_over_ranks(tensor: torch.Tensor) -> StartedSum | None:
    """Starts the sum in place and returns what to wait for before the tensor is read; None on one rank."""
    return StartedSum(tensor) if world_size() > 1 else None


class CollectiveCounter(TorchDispatchMode):
    """Counts this rank's collectives while it is entered, DeepSpeed's too: calls and bytes by kind.

    Bytes are those of the whole tensor, the larger of input and output, not of what one network link carries.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            kind = function.overloadpacket.__name__.strip("_")
            self.calls[kind] += 1
            self.bytes[kind] += max(
                sum(leaf.nbytes for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor))
                for argument in args
            )
        return function(*args, **(kwargs or {}))

    def summary(self) -> dict[str, dict[str, int]]:
        """Returns {kind: {"calls": n, "bytes": n}}."""
        return {kind: {"calls": self.calls[kind], "bytes": self.bytes[kind]} for kind in sorted(self.calls)}


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


class StartedGather:
    """The values of all ranks' (n, …) tensors, on their way while something else is computed."""

    def __init__(self, tensor: torch.Tensor):
        sent = _to_backend(tensor.detach()).contiguous()
        self._device = tensor.device
        # one tensor: with thousands of ranks a second copy of everybody's features would count
        self._whole = sent.new_empty(world_size() * len(sent), *sent.shape[1:])
        self._work = dist.all_gather(list(self._whole.chunk(world_size())), sent, async_op=True)

    def wait(self) -> torch.Tensor:
        """Returns them in rank order, concatenated, where the tensor was."""
        self._work.wait()
        return self._whole.to(self._device)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, started: StartedGather | None) -> torch.Tensor:
        return (started or StartedGather(tensor)).wait()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        sent = _to_backend(gradient).contiguous()
        own = sent.new_empty(len(sent) // world_size(), *sent.shape[1:])
        getattr(dist, REDUCE_SCATTER)(own, sent)
        return own.to(gradient.device), None


def start_gather(tensor: torch.Tensor) -> StartedGather | None:
    """Starts what `gather_with_gradient` does with the same tensor later; None on one rank."""
    return StartedGather(tensor) if world_size() > 1 else None


def gather_with_gradient(tensor: torch.Tensor, started: StartedGather | None = None) -> torch.Tensor:
    """Concatenates the (n, …) tensors of all ranks, in rank order; n must be equal on every rank.

    started: what `start_gather` returned for this tensor, if it was called. The backward sums every rank's gradient for
    this rank's block, so with a loss that is averaged over ranks (as ZeRO does with gradients) the result is the
    gradient of the mean of all ranks' losses.
    """
    return _Gather.apply(tensor, started) if world_size() > 1 else tensor


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenates the (n, …) tensors of all ranks without gradient."""
    with torch.no_grad():
        return gather_with_gradient(tensor)


def gathered(parameters: Iterable[torch.Tensor], modify: bool = False) -> AbstractContextManager:
    """Makes the full values of ZeRO-3's sharded parameters readable inside the context; a collective.

    With `modify`, rank 0's values inside the context become the new ones on every rank. Other parameters are left
    alone.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if modify else None)


@contextmanager
def stored_copies(parameter: torch.nn.Parameter) -> Iterator[list[tuple[torch.Tensor, int]]]:
    """Gives what this rank stores of a parameter: flat tensors, each with its offset in the flattened parameter.

    Under ZeRO-3 that is this rank's part, and with ZeRO++ (hpZ) a second part that the ranks of one node share. A part
    that lies on NVMe is read, and written again at the end.
    """
    if not hasattr(parameter, "ds_id"):
        yield [(parameter.data.view(-1), 0)]
        return
    part, second = parameter.ds_tensor, parameter.ds_secondary_tensor
    is_on_disk = part.status.name == "NOT_AVAILABLE"
    if is_on_disk:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    copies = [(part.data, rank() * part.ds_numel)]
    if second is not None:
        copies.append((second.data, rank() % parameter.ds_secondary_tensor_group_size * second.ds_numel))
    yield copies
    if is_on_disk:
        parameter.nvme_swapper.swap_out_and_release([parameter])


def drop_whole_copy(parameter: torch.nn.Parameter) -> None:
    """Drops the whole copy that ZeRO-3 may hold of a parameter beside its shards, as it does of small ones.

    To be called after the shard was changed: the next use gathers the new values. Other parameters are left alone.
    """
    if hasattr(parameter, "ds_id") and parameter.ds_status.name == "AVAILABLE":
        parameter.partition()


def from_rank(tensor: torch.Tensor, where: int) -> torch.Tensor:
    """Gives the tensor, equally large on all ranks, the values of one rank and returns it."""
    if world_size() == 1:
        return tensor
    sent = _to_backend(tensor)
    dist.broadcast(sent, where)
    return _bring_back(tensor, sent)


def shaped_from_rank(tensor: torch.Tensor | None, where: int, device: torch.device | str) -> torch.Tensor:
    """Gives all ranks, in fp32 on `device`, a tensor of one rank whose shape the others need not know; a collective.

    tensor: of at most seven dimensions; None on the others.
    """
    shape = torch.zeros(8, dtype=torch.int64)
    if tensor is not None and rank() == where:
        shape[: tensor.dim() + 1] = torch.tensor([tensor.dim(), *tensor.shape])
        tensor = tensor.detach().float().to(device).contiguous()
    dims, *sizes = from_rank(shape, where).tolist()
    return from_rank(tensor if rank() == where else torch.empty(sizes[:dims], device=device), where)


def agree(action: Callable[[], Any]) -> Any:
    """Runs the action on rank 0 and returns its result, something that JSON can hold, on every rank.

    An InputError of the action is raised on every rank, so that all end together.
    """
    answer: dict[str, Any] = {}
    if rank() == 0:
        try:
            answer = {"result": action()}
        except InputError as error:
            answer = {"error": str(error)}
    if world_size() > 1:
        content = torch.tensor(list(json.dumps(answer).encode()), dtype=torch.uint8)
        size = from_rank(torch.tensor([len(content)]), 0)
        content = content if rank() == 0 else torch.empty(int(size), dtype=torch.uint8)
        answer = json.loads(bytes(from_rank(content, 0).tolist()))
    if "error" in answer:
        raise InputError(answer["error"])
    return answer["result"]


def gather_bytes(content: bytes) -> list[bytes]:
    """Returns what each rank gives, in rank order, on every rank; lengths may differ."""
    if world_size() == 1:
        return [content]
    sizes = gather(torch.tensor([len(content)])).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    return [bytes(part[:size].tolist()) for part, size in zip(gather(padded).view(len(sizes), -1), sizes, strict=True)]
