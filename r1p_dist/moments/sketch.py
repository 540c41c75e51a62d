"""A second moment by its leading directions: what is kept of inputs too wide for a full matrix, and in files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        if len(joint) <= _EXACT:
            values, vectors = _leading(joint @ joint.T, keep)
        else:
            values, vectors = _leading_by_products(lambda basis: joint @ (joint.T @ basis), joint, keep)
        found = cls._of_pairs(values, vectors, joint.square().sum(), len(joint))
        return cls(found.factor, found.rest + rest)

    @classmethod
    def of_product(cls, product: torch.Tensor, trace: torch.Tensor, keep: int) -> Sketch:
        """Returns the sketch of a moment C that was never formed: of C P (in, p) with P = `directions(in, keep)`, and
        of its trace ().

        C ~ C P (P^T C P)^-1 P^T C, of which the leading directions are kept (Nystroem; Tropp et al., arXiv 1706.05736,
        algorithm 3, with a pseudo-inverse: few tokens leave P^T C P singular).
        """
        probe = directions(len(product), keep).to(product.device)
        values, vectors = torch.linalg.eigh((probe.T @ product).double())
        is_there = values > values[-1] * len(product) * torch.finfo(product.dtype).eps
        root = vectors * values.where(is_there, torch.inf).rsqrt()
        half = product.double() @ root  # C ~ half half^T
        values, vectors = torch.linalg.eigh(half.T @ half)
        values, vectors = values[-keep:].clamp(min=0), vectors[:, -keep:]
        vectors = half @ (vectors / values.sqrt().where(values > 0, 1))
        return cls._of_pairs(values.to(product.dtype), vectors.to(product.dtype), trace, len(product))

    @classmethod
    def _of_pairs(cls, values: torch.Tensor, vectors: torch.Tensor, trace: torch.Tensor, width: int) -> Sketch:
        """values (k,), vectors (in, k): the leading eigenpairs of a matrix with this trace and width."""
        values = values.clamp(min=0)
        others = width - len(values)
        rest = ((trace - values.sum()) / others).clamp(min=0) if others else torch.zeros_like(trace)
        return cls(vectors * (values - rest).clamp(min=0).sqrt(), rest)

    def normalised(self) -> Sketch:
        """Returns it with a mean eigenvalue of one; of nothing, itself."""
        mean = self.trace() / len(self.factor)
        return self if not mean else Sketch(self.factor / mean.sqrt(), self.rest / mean)

    def trace(self) -> torch.Tensor:
        """Returns the sum of the eigenvalues, ()."""
        return self.factor.square().sum() + len(self.factor) * self.rest

    def to(self, device: torch.device) -> Sketch:
        """Returns it on a device."""
        return Sketch(self.factor.to(device), self.rest.to(device))

    def times(self, A: torch.Tensor) -> torch.Tensor:
        """Returns A C of an A (k, in)."""
        return (A @ self.factor) @ self.factor.T + self.rest * A

    def whole(self) -> torch.Tensor:
        """Returns C (in, in)."""
        return self.factor @ self.factor.T + self.rest * torch.eye(len(self.factor), device=self.factor.device)


def directions(width: int, keep: int) -> torch.Tensor:
    """Returns the orthonormal directions (width, p) that a moment is multiplied by for a sketch of `keep`; always the
    same, on any rank. Four times as many as are kept: with twice, errors were up to 1.8 of the best sketch's on inputs
    of the shipped CLIP's fc2, with four times 1.07."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(width, min(4 * keep, width), generator=generator)).Q


def _leading(moment: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the largest eigenvalues (k,) and their eigenvectors (in, k) of a symmetric matrix."""
    width = len(moment)
    if width <= _EXACT or keep + _MORE >= width:
        values, vectors = torch.linalg.eigh(moment.double())
        return values[-keep:].to(moment.dtype), vectors[:, -keep:].to(moment.dtype)
    return _leading_by_products(moment.matmul, moment, keep)


def _leading_by_products(
    times: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the same of a matrix known by its products, with as many rows as `like`, and on its device.

    Subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4), from the same start each time.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(like), min(keep + _MORE, len(like)), generator=generator).to(like)
    basis = torch.linalg.qr(times(start)).Q
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(times(basis)).Q
    values, vectors = torch.linalg.eigh(basis.T @ times(basis))
    return values[-keep:], (basis @ vectors)[:, -keep:]
