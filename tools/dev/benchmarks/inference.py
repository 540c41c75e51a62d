"""The time of a forward pass with merged experts, against the same model that never had any.

Both are in evaluation mode and encode the same images and prompts; the ratio should be 1.00.
"""

import argparse
from typing import Any

import torch
from torch import nn

from benchmarks.measure import CPU, interleaved, medians, processor, ratio
from benchmarks.models import build, random_images
from r1p_dist import attach_pool

PROMPTS = ["a photo of a dog.", "a photo of a small church by a lake."]


@torch.no_grad()
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the medians and the ratio merged/plain."""
    torch.set_num_threads(arguments.threads)
    plain, merged = (build(arguments.model, CPU, torch.float32) for _ in range(2))
    for adapter in attach_pool(merged).adapters:
        torch.nn.init.normal_(adapter.B, std=1e-3)
        adapter.merge()
    image = random_images(plain, arguments.batch, torch.Generator().manual_seed(0))
    tokens = plain.tokenize(PROMPTS).repeat(-(-arguments.batch // 2), 1)[: arguments.batch]
    seconds = time_forward(plain, merged, {"image": image, "tokens": tokens}, arguments.pairs)
    return {
        "processor": processor(),
        "model": arguments.model,
        "merged/plain": round(ratio(seconds, "merged", "plain"), 3),
        "median_s": {name: round(value, 4) for name, value in medians(seconds).items()},
    }


@torch.no_grad()
def time_forward(
    plain: nn.Module, merged: nn.Module, batch: dict[str, Any], rounds: int, device: torch.device = CPU
) -> dict[str, list[float]]:
    """Returns the seconds of forward passes of two models in evaluation mode, called with a batch's entries."""
    plain.eval(), merged.eval()
    return interleaved({"plain": lambda: plain(**batch), "merged": lambda: merged(**batch)}, rounds, device)
