"""The time of a forward pass with merged experts, against the same model that never had any.

Both are in evaluation mode and encode the same images and prompts; the ratio should be 1.00.
"""

import argparse
from typing import Any

import torch

from benchmarks.measure import interleaved, medians, processor, ratio
from benchmarks.step import random_images
from r1p_dist import attach_pool, load_clip

PROMPTS = ["a photo of a dog.", "a photo of a small church by a lake."]


@torch.no_grad()
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the medians and the ratio merged/plain."""
    torch.set_num_threads(arguments.threads)
    plain, merged = load_clip(arguments.model), load_clip(arguments.model)
    for adapter in attach_pool(merged):
        torch.nn.init.normal_(adapter.B, std=1e-3)
        adapter.merge()
    plain.eval(), merged.eval()
    image = random_images(plain, arguments.batch, torch.Generator().manual_seed(0))
    tokens = plain.tokenize(PROMPTS).repeat(-(-arguments.batch // 2), 1)[: arguments.batch]
    seconds = interleaved(
        {"plain": lambda: plain(image, tokens), "merged": lambda: merged(image, tokens)}, arguments.pairs
    )
    return {
        "processor": processor(),
        "model": arguments.model,
        "merged/plain": round(ratio(seconds, "merged", "plain"), 3),
        "median_s": {name: round(value, 4) for name, value in medians(seconds).items()},
    }
