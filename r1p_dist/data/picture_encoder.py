"""The encoder of backbones that take one picture of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from r1p_dist.data.samples import Sample
from r1p_dist.data.transforms import evaluation_transform, train_transform


class PictureEncoder:
    """Encodes the one picture of a sample as {"image": (3, H, W) float32}; a batch has (n, 3, H, W)."""

    def __init__(self, preprocess: dict[str, Any], augment: bool) -> None:
        """preprocess: open_clip's. augment: random crops in training, as `train_transform` makes them."""
        self._train, self._evaluate = train_transform(preprocess, augment), evaluation_transform(preprocess)

    def train(self, sample: Sample, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"image": self._train(sample.images[0], generator)}

    def evaluate(self, sample: Sample) -> dict[str, torch.Tensor]:
        return {"image": self._evaluate(sample.images[0])}

    def blank(self) -> dict[str, torch.Tensor]:
        return {"image": self._evaluate(Image.new("RGB", (1, 1)))}

    def collate(self, examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {"image": torch.stack([example["image"] for example in examples])}
