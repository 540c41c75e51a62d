"""Between host and device without a wait: small results on their way back, batches on their way there."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


class HostCopy:
    """A small tensor's values on their way to the host; reading them waits for the work before it alone."""

    def __init__(self, tensor: torch.Tensor):
        is_elsewhere = tensor.device.type != "cpu"
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_elsewhere)
        self._host.copy_(tensor, non_blocking=True)
        self._host.is_host_copy = True  # for HostWaits
        self._arrived = None
        if is_elsewhere:
            self._arrived = torch.Event(tensor.device)
            self._arrived.record()

    def read(self) -> list:
        """Returns the values."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.numpy().tolist()


def on_device(
    steps: Iterable[list[dict[str, Any]]], prepare: Callable[[dict[str, Any]], dict[str, Any]], device: torch.device
) -> Iterator[list[dict[str, Any]]]:
    """Yields the micro batches of one optimizer step after another with their tensors on the device.

    The next step's are read, given to `prepare` and sent before a step's are yielded, from pinned memory and on a
    stream of their own: the copy runs beside the step.
    """
    stream = torch.Stream(device=device) if device.type != "cpu" else None
    ahead: _Sent | None = None
    for batches in steps:
        sent = _Sent([prepare(batch) for batch in batches], stream)
        if ahead is not None:
            yield ahead.arrived()
        ahead = sent
    if ahead is not None:
        yield ahead.arrived()


class _Sent:
    """Micro batches on their way to a stream's device; None: they are where they shall be."""

    def __init__(self, batches: list[dict[str, Any]], stream: torch.Stream | None):
        self._batches, self._there = batches, None
        if stream is not None:
            with stream:
                self._batches = [{name: _send(value, stream.device) for name, value in b.items()} for b in batches]
                self._there = stream.record_event()

    def arrived(self) -> list[dict[str, Any]]:
        """Returns them; the device's work that comes now waits for the copies, and keeps their memory until then."""
        if self._there is not None:
            current = torch.accelerator.current_stream()
            current.wait_event(self._there)
            for tensor in (value for batch in self._batches for value in batch.values()):
                if isinstance(tensor, torch.Tensor):
                    tensor.record_stream(current)
        return self._batches


def _send(value: Any, device: torch.device) -> Any:
    return value.pin_memory().to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
