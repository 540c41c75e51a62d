"""From samples to a backbone's input: what the loaders ask of a backbone.

A sample becomes an example, and the examples of a batch become tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from r1p_dist.data.samples import Sample


class Encoder(Protocol):
    """Makes a backbone's batches; pickled into the loaders' workers.

    `train` and `evaluate` may raise BadSampleError, and the sample then counts as one that cannot be decoded.
    """

    def train(self, sample: Sample, generator: torch.Generator) -> dict[str, Any]:
        """Return the training example of a sample; whatever is random in it comes from the generator."""

    def evaluate(self, sample: Sample) -> dict[str, Any]:
        """Return the example that a sample is evaluated with."""

    def blank(self) -> dict[str, Any]:
        """Return an example for evaluation that stands in where a rank has no sample."""

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch of one or more examples, all for training or all for evaluation."""


class PictureEncoder:
    """Encodes the one picture of a sample as {"image": (3, H, W) float32}; a batch has (n, 3, H, W)."""

    def __init__(self, preprocess: dict[str, Any], augment: bool) -> None:
        """preprocess: open_clip's. augment: random crops in training, as `train_transform` makes them."""
        from r1p_dist.data.transforms import evaluation_transform, train_transform  # imports open_clip

        self._train, self._evaluate = train_transform(preprocess, augment), evaluation_transform(preprocess)

    def train(self, sample: Sample, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"image": self._train(sample.images[0], generator)}

    def evaluate(self, sample: Sample) -> dict[str, torch.Tensor]:
        return {"image": self._evaluate(sample.images[0])}

    def blank(self) -> dict[str, torch.Tensor]:
        return {"image": self._evaluate(Image.new("RGB", (1, 1)))}

    def collate(self, examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {"image": torch.stack([example["image"] for example in examples])}
