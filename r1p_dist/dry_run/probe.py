"""What a run takes, phase by phase: memory by kind, and collectives."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from r1p_dist.distributed import CollectiveCounter
from r1p_dist.engine import TaskEngine
from r1p_dist.storage_meter import StorageMeter

KINDS = ("weights", "gathered", "gradients", "optimizer", "exchanged", "activations")
# Who asks for memory: the innermost of these files on the stack says what it is for.
_OWNERS = (
    ("r1p_dist/adapters/pristine.py", "pristine"),
    ("r1p_dist/distributed.py", "exchanged"),
    ("torch/nn/modules/module.py", "activations"),  # the forward and the backward, which DeepSpeed calls
    ("torch/autograd/graph.py", "activations"),
    ("torch/optim/", "optimizer"),
    ("deepspeed/runtime/zero/partition", "gathered"),
    ("deepspeed/runtime/", "gradients"),
)
_COLLECTIVES = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all", "broadcast", "barrier", "reduce")


@dataclass(frozen=True)
class Phase:
    """What a part of a run took. memory: bytes by kind at the moment of the highest sum, and that as `total`.

    allocator: the highest bytes that the accelerator's allocator handed out, None on a CPU. collectives: kind -> calls
    and bytes, those of the whole tensors.
    """

    memory: dict[str, int]
    allocator: int | None
    collectives: dict[str, dict[str, int]]


def joined(first: Phase, second: Phase) -> Phase:
    """Returns two phases as one: the higher memory, and all collectives."""
    higher = max(first, second, key=lambda phase: phase.memory["total"])
    collectives: dict[str, Counter[str]] = {}
    for phase in (first, second):
        for kind, counts in phase.collectives.items():
            collectives.setdefault(kind, Counter()).update(counts)
    allocator = None if first.allocator is None else max(first.allocator, second.allocator)
    return Phase(higher.memory, allocator, {kind: dict(counts) for kind, counts in sorted(collectives.items())})


class Probe:
    """Counts memory and collectives, and cuts the run into phases; a phase that comes again replaces the one before."""

    def __init__(self, device: torch.device) -> None:
        self.phases: dict[str, Phase] = {}
        self._meter, self._counter = _KindMeter(device), CollectiveCounter()
        self._has_allocator = device.type != "cpu"

    def __enter__(self) -> "Probe":
        self._counter.__enter__()
        self._meter.__enter__()
        self.drop()
        return self

    def __exit__(self, *exception: object) -> None:
        self._meter.__exit__(*exception)
        self._counter.__exit__(*exception)

    def settle(self, model: nn.Module, engine: TaskEngine | None = None) -> None:
        """Finds the weights and the optimizer's state, whoever made them."""
        self._meter.assign("weights", [*_kept_parameters(model), *model.buffers()])
        if engine is not None:
            self._meter.assign("optimizer", _optimizer_state(engine))
        self._meter.default = "activations"

    def cut(self, name: str) -> None:
        """Ends a phase here."""
        memory = {kind: self._meter.highest[kind] for kind in KINDS}
        memory["total"] = sum(memory.values())
        allocator = torch.accelerator.max_memory_allocated() if self._has_allocator else None
        self.phases[name] = Phase(memory, allocator, by_kind(self._counter.summary()))
        self.drop()

    def drop(self) -> None:
        """Begins a phase here and forgets what was since the last one."""
        self._meter.begin()
        self._counter.calls.clear()
        self._counter.bytes.clear()
        if self._has_allocator:
            torch.accelerator.reset_peak_memory_stats()


class _KindMeter(StorageMeter):
    """Knows for every storage on the device what it is for. highest: bytes by kind at the highest sum of a phase."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.default = "weights"  # until they are there
        self.highest: Counter[str] = Counter()
        self._type = device.type
        self._kinds: dict[int, str] = {}
        self._bytes: Counter[str] = Counter()

    def begin(self) -> None:
        self.take_peak()
        self.highest = self._bytes.copy()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.see(output)
        return output

    def is_counted(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._type

    def grow(self, key: int, size: int) -> None:
        kind = self._kinds[key] = self._kind()
        self._bytes[kind] += size
        if kind != "pristine":  # in a file
            peak = self._peak
            super().grow(key, size)
            if self._peak > peak:
                self.highest = self._bytes.copy()

    def shrink(self, key: int, size: int) -> None:
        kind = self._kinds.pop(key)
        self._bytes[kind] -= size
        if kind != "pristine":
            super().shrink(key, size)

    def assign(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """Says what these are for."""
        for tensor in tensors:
            if self.is_counted(tensor):
                self.see(tensor)
                storage = tensor.untyped_storage()
                before, self._kinds[storage._cdata] = self._kinds[storage._cdata], kind
                self._bytes[before] -= storage.nbytes()
                self._bytes[kind] += storage.nbytes()

    def _kind(self) -> str:
        frame = sys._getframe(1)
        while frame is not None:
            for path, kind in _OWNERS:
                if path in frame.f_code.co_filename and frame.f_code.co_name != "__torch_dispatch__":
                    return self.default if kind == "activations" else kind
            frame = frame.f_back
        return self.default


def _kept_parameters(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yields what this rank keeps of each parameter: its part under ZeRO-3."""
    for parameter in model.parameters():
        yield parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter.data


def _optimizer_state(engine: TaskEngine) -> Iterator[torch.Tensor]:
    """Yields the moments and, where it is another tensor than the parameter itself, the fp32 value."""
    outer = engine.engine.optimizer
    own = {parameter.untyped_storage()._cdata for parameter in _kept_parameters(engine.engine.module)}
    for value, state in getattr(outer, "optimizer", outer).state.items():
        if value.untyped_storage()._cdata not in own:
            yield value.data
        yield from (tensor for tensor in state.values() if tensor.dim())


def by_kind(summary: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Returns the counts under the usual names: `allgather` and `allgather_base` are both all_gather."""
    found: dict[str, Counter[str]] = {}
    for name, counts in summary.items():
        plain = name.replace("_", "")
        kind = next((kind for kind in _COLLECTIVES if plain.startswith(kind.replace("_", ""))), name)
        found.setdefault(kind, Counter()).update(counts)
    return {kind: dict(counts) for kind, counts in sorted(found.items())}
