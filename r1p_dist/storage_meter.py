"""Counts the bytes of tensors as they come and go, on any device, whatever an allocator makes of them."""

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageMeter(TorchDispatchMode):
    """While it is entered, knows the bytes of all storages that operations made and that still live (`live`)."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self._peak = 0
        self._known: set[int] = set()

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leaves out what is there already."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage()._cdata)

    def take_peak(self) -> int:
        """Returns the highest bytes since the last call."""
        peak, self._peak = self._peak, self.live
        return peak

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.see(output)
        return output

    def see(self, output: object) -> None:
        """Counts the storages of the tensors in what an operation returned."""
        for tensor in [output] if isinstance(output, torch.Tensor) else tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and self.is_counted(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
                    self.grow(storage._cdata, storage.nbytes())

    def is_counted(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies where bytes are counted: everywhere."""
        return True

    def grow(self, key: int, size: int) -> None:
        """Takes note of a new storage; key: what tells it from the others while it lives."""
        self.live += size
        self._peak = max(self._peak, self.live)

    def shrink(self, key: int, size: int) -> None:
        """Takes note of a storage that is gone."""
        self.live -= size

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.shrink(key, size)
