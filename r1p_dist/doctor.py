"""`r1p doctor`: what this machine has, what it lacks, and what each lack means."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

from r1p_dist.arguments import Parser
from r1p_dist.errors import InputError

DISTRIBUTION = "r1p-dist"
ALLOCATOR_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
ALLOCATOR_VALUE = 4294967296  # bytes


def main(prog: str, argv: Sequence[str]) -> int:
    """Examines this machine."""
    Parser(prog=prog, description="Say what this machine has and what it lacks.").parse_args(argv)
    return examine()


def examine() -> int:
    """Print one line for each thing that matters here; return 1 if something needed is missing, else 0."""
    lacks = _examine_packages()
    accelerator = _examine_accelerator()
    _examine_processor()
    lacks += _examine_programs(accelerator)
    _examine_allocator()
    print(f"result       {'; '.join(lacks) if lacks else 'nothing needed is missing'}")
    return 1 if lacks else 0


def _examine_packages() -> list[str]:
    print(f"python       {platform.python_version()}")
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or []]
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"{DISTRIBUTION} is not installed in this Python: run `make train` or `pip install -e .`"
        ) from error
    lacks = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            lacks.append(f"package {requirement.name} is missing")
            print(f"package      {requirement.name}: missing, pip install '{requirement}'")
            continue
        is_tested = requirement.specifier.contains(version, prereleases=True)
        print(f"package      {requirement.name} {version}{'' if is_tested else f' (tested: {requirement.specifier})'}")
    return lacks


def _examine_accelerator() -> str | None:
    import torch

    if not torch.accelerator.is_available():
        print("accelerator  none: training runs on the processor, with gloo between ranks")
        return None
    kind = torch.accelerator.current_accelerator().type
    print(f"accelerator  {torch.accelerator.device_count()} x {kind}")
    return kind


def _examine_processor() -> None:
    print(f"cores        {len(os.sched_getaffinity(0))} usable")
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(f"memory       {memory_bytes / 2**30:.1f} GiB")
    print(f"bf16         {_bf16_speed(_processor_flags())}")


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()}


def _bf16_speed(flags: set[str]) -> str:
    if "amx_bf16" in flags:
        return "fast on this processor (AMX): 4 to 8 times fp32 in big products"
    if "avx512_bf16" in flags:
        return "fast on this processor (AVX512-BF16): about twice fp32 in big products"
    return "no processor support (neither AMX nor AVX512-BF16): fp32 is faster here"


def _examine_programs(accelerator: str | None) -> list[str]:
    lacks = []
    if shutil.which("g++"):
        print("g++          found")
    elif accelerator is None:
        print("g++          missing: DeepSpeed compiles one operation at its first start on CPU; apt install g++")
        lacks.append("g++ is missing")
    else:
        print("g++          missing: needed only for training on CPU")
    if shutil.which("numactl"):
        print("numactl      found")
    else:
        print("numactl      missing: ranks cannot be bound to cores (--bind_cores_to_rank); all else works")
    return lacks


def _examine_allocator() -> None:
    for name in ALLOCATOR_VARIABLES:
        value = os.environ.get(name)
        state = value if value is not None else f"not set: on CPU steps are up to 3 times faster with {ALLOCATOR_VALUE}"
        print(f"{name} {state}")
