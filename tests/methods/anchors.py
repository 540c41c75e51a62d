"""Moments of noise for the layers of a method, as a file of `r1p moments` has them."""

from typing import Any

import torch

from r1p_dist.backbones import weights_identity
from r1p_dist.protocol import Method


def noise_moments(method: Method) -> dict[str, Any]:
    """Returns what `write_moments` takes beside the file and how much is kept; no two layers share an input."""
    generator = torch.Generator().manual_seed(0)

    def noise(width: int) -> torch.Tensor:
        x = torch.randn(40, width, generator=generator)
        return x.T @ x

    return {
        "moments": {adapter.name: noise(adapter.in_features) for adapter in method.adapters},
        "gradients": {adapter.name: noise(adapter.out_features) for adapter in method.adapters},
        "layers": {adapter.name: [adapter.name] for adapter in method.adapters},
        "facts": {"backbone": weights_identity(method.config.backbone, method.backbone), "source": "noise"},
    }
