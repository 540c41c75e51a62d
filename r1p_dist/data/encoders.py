"""From samples to a backbone's input: what the loaders ask of a backbone.

A sample becomes an example, and the examples of a batch become tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

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
