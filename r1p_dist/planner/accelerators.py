"""What accelerators can do at most."""

import difflib
from dataclasses import dataclass

from r1p_dist.errors import InputError


@dataclass(frozen=True)
class Accelerator:
    """Dense peak operations per second in bf16 and fp32 (NVIDIA's data sheets; TF32 is off in torch by default)."""

    name: str
    bf16: float
    fp32: float


ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator("a100", 312e12, 19.5e12),
        Accelerator("h100", 989e12, 67e12),
        Accelerator("h200", 989e12, 67e12),
        Accelerator("l40s", 362e12, 91.6e12),
    )
}


def find_accelerator(name: str) -> Accelerator:
    """Returns a known accelerator. InputError: there is none of that name."""
    if name not in ACCELERATORS:
        nearest = difflib.get_close_matches(name, ACCELERATORS, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise InputError(f"--device {name}: {hint}known: {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]
