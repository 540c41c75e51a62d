"""The precision that a model runs in on this machine."""

import torch


def choose_precision(asked: str) -> tuple[str, str]:
    """Returns `fp32` or `bf16` and the reason for it. asked: the value of `train.precision`."""
    if asked != "auto":
        return asked, "set by train.precision"
    if torch.accelerator.is_available():
        return "bf16", "an accelerator is there"
    return "fp32", "no accelerator; exact, and small models gain nothing from bf16 on CPU"


def precision_type(asked: str) -> torch.dtype:
    """Returns the type that a model is cast to."""
    return torch.bfloat16 if choose_precision(asked)[0] == "bf16" else torch.float32
