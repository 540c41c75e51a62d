"""A second moment by its leading directions: what is kept of inputs too wide for a full matrix, and in files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_EXACT = 2048  # up to this width all eigenvectors are computed; beyond, the leading ones alone
_MORE, _ROUNDS = 16, 6  # directions beside those wanted, and products with the matrix, of the subspace iteration


@dataclass(frozen=True)
class Sketch:
    """C (in, in) ~ F F^T + rest * I: the leading eigenvalues exactly, all others as their mean, so C's trace stays.

    factor: F (in, k). rest: ().
    """

    factor: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def of(cls, moment: torch.Tensor, keep: int) -> Sketch:
        """Returns the sketch of a moment (in, in) with `keep` directions, or all where there are fewer."""
        values, vectors = _leading(moment, keep)
        return cls._of_pairs(values, vectors, moment.trace(), len(moment))

    @classmethod
    def mean(cls, sketches: Sequence[Sketch], weights: Sequence[float], keep: int) -> Sketch:
        """Returns the sketch of the weighted mean of what sketches stand for."""
        shares = [weight / sum(weights) for weight in weights]
        joint = torch.cat([share**0.5 * sketch.factor for share, sketch in zip(shares, sketches, strict=True)], 1)
        rest = torch.stack([share * sketch.rest for share, sketch in zip(shares, sketches, strict=True)]).sum()
        vectors, values, _ = torch.linalg.svd(joint, full_matrices=False)
        values = values.square()
        found = cls._of_pairs(values[:keep], vectors[:, :keep], values.sum(), len(joint))
        return cls(found.factor, found.rest + rest)

    @classmethod
    def _of_pairs(cls, values: torch.Tensor, vectors: torch.Tensor, trace: torch.Tensor, width: int) -> Sketch:
        """values (k,), vectors (in, k): the leading eigenpairs of a matrix with this trace and width."""
        values = values.clamp(min=0)
        others = width - len(values)
        rest = ((trace - values.sum()) / others).clamp(min=0) if others else torch.zeros_like(trace)
        return cls(vectors * (values - rest).clamp(min=0).sqrt(), rest)

    def normalised(self) -> Sketch:
        """Returns it with a mean eigenvalue of one; of nothing, itself."""
        width = len(self.factor)
        mean = (self.factor.square().sum() + width * self.rest) / width
        return self if not mean else Sketch(self.factor / mean.sqrt(), self.rest / mean)

    def to(self, device: torch.device) -> Sketch:
        """Returns it on a device."""
        return Sketch(self.factor.to(device), self.rest.to(device))

    def times(self, A: torch.Tensor) -> torch.Tensor:
        """Returns A C of an A (k, in)."""
        return (A @ self.factor) @ self.factor.T + self.rest * A

    def whole(self) -> torch.Tensor:
        """Returns C (in, in)."""
        return self.factor @ self.factor.T + self.rest * torch.eye(len(self.factor), device=self.factor.device)


def _leading(moment: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the largest eigenvalues (k,) and their eigenvectors (in, k) of a symmetric matrix.

    Of a wide one by subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4), from the same start each time.
    """
    width = len(moment)
    if width <= _EXACT or keep + _MORE >= width:
        values, vectors = torch.linalg.eigh(moment.double())
        values, vectors = values[-keep:].to(moment.dtype), vectors[:, -keep:].to(moment.dtype)
        return values, vectors
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(width, keep + _MORE, generator=generator).to(moment.device, moment.dtype)
    basis = torch.linalg.qr(moment @ start).Q
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(moment @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ (moment @ basis))
    return values[-keep:], (basis @ vectors)[:, -keep:]
