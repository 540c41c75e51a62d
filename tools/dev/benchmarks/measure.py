"""Fair measurements on a noisy machine: interleaved times, ratios of medians, peak memory of a fresh process."""

import gc
import logging
import math
import multiprocessing
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

CPU = torch.device("cpu")


def interleaved(
    variants: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device = CPU, limit_s: float = math.inf
) -> dict[str, list[float]]:
    """Returns the seconds of each call: all variants in turn, `rounds` times, after one round that is not counted.

    device: whose work is waited for. limit_s: no further round is begun after so long.
    """
    ends = time.perf_counter() + limit_s
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            finish(device)
            started = time.perf_counter()
            run()
            finish(device)
            seconds[name].append(time.perf_counter() - started)
        if time.perf_counter() > ends:
            break
    return seconds


def finish(device: torch.device) -> None:
    """Waits for what an accelerator has yet to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> float:
    """Returns the median over rounds of one variant's time through another's, so that slow phases cancel out."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def processor() -> str:
    """Returns the processor's name and which matrix extensions it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    flags = values.get("flags", "").split()
    extensions = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{values.get('model name', platform.machine())}, family {values.get('cpu family', '?')} {extensions}"


def anonymous_bytes() -> int:
    """Returns this process's anonymous resident memory; file-backed pages (mapped weights) are not in it. Linux."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def live_tensor_bytes() -> int:
    """Returns the bytes of the storages of all tensors alive in this process, each storage once."""
    gc.collect()
    # these types alone: torch.compile leaves tensors without storage behind
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return stored_bytes(tensors)


@contextmanager
def quiet():
    """Silences log lines below an error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def peak_of_call(run: Callable[[], Any], device: torch.device) -> int:
    """Returns the bytes that a call takes on an accelerator, at their highest, beside those in use before it."""
    finish(device)
    before = torch.accelerator.memory_allocated(device)
    torch.accelerator.reset_peak_memory_stats(device)
    run()
    finish(device)
    return torch.accelerator.max_memory_allocated(device) - before


def stored_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Returns the bytes of the tensors' storages, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class PeakMemory:
    """The highest anonymous memory while the context is open, looked at every two milliseconds."""

    def __enter__(self) -> "PeakMemory":
        self.bytes, self._open = anonymous_bytes(), True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._open:
            self.bytes = max(self.bytes, anonymous_bytes())
            time.sleep(0.002)

    def __exit__(self, *exception: object) -> None:
        self._open = False
        self._thread.join()


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns function(*arguments) from a new process that gives freed memory back at once, so that peaks are real."""
    with _environment(MALLOC_TRIM_THRESHOLD_="0", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="1"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(function, arguments)


@contextmanager
def _environment(**values: str):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
