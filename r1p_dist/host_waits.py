"""Counts what would make the host wait for an accelerator, also on a machine that has none."""

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or its size, the host must know. Each is one wait.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_consecutive"}
# Methods that read a tensor on the host without an operator where it lies there already.
_READING = {"tolist", "numpy", "cpu", "__array__"}


class HostWaits(TorchDispatchMode):
    """Counts, while it is entered, the operations that would wait for a device: `calls`, by name.

    Every tensor counts as one of a device, on a CPU too, but for a `HostCopy`, which is read when it has arrived.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._reads = _Reads(self.calls)

    def __enter__(self) -> "HostWaits":
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._reads.__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in _WAITING or name.startswith("_unique") or _selects(name, args) or _goes_to_host(name, args, kwargs):
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    def __init__(self, calls: Counter[str]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in _READING and not getattr(args[0], "is_host_copy", False):
            self._calls[function.__name__] += 1
        return function(*args, **(kwargs or {}))


def _selects(name: str, args: tuple) -> bool:
    """Whether it is an index by a mask, whose size the host must know."""
    masks = (torch.bool, torch.uint8)
    return name in ("index", "index_put", "index_put_") and any(i is not None and i.dtype in masks for i in args[1])


def _goes_to_host(name: str, args: tuple, kwargs: dict | None) -> bool:
    """Whether it is a copy from a device to the host that waits."""
    if name == "_to_copy":
        kwargs = kwargs or {}
        target = kwargs.get("device")
        is_host = target is not None and torch.device(target).type == "cpu"
        return is_host and args[0].device.type != "cpu" and not kwargs.get("non_blocking", False)
    if name == "copy_" and isinstance(args[1], torch.Tensor):
        waits = not (args[2] if len(args) > 2 else False)
        return waits and args[0].device.type == "cpu" and args[1].device.type != "cpu"
    return False
