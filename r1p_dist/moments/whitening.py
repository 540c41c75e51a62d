"""Coordinates of a layer's input or output in which what is known of it is about alike in all directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from r1p_dist.moments.sketch import Sketch


@dataclass(frozen=True)
class Whitening:
    """R (in, in), symmetric: c (C / mean + ridge I)^(-1/2) of a second moment C and the mean of its eigenvalues.

    c keeps the energy, tr(R C R) = tr(C). Where C is a sketch, so is R. matrix: R, or F (in, k) where
    R = gain (I - F F^T). span: c^2 mean, and ridge times mean, for what `moment` says.
    """

    matrix: torch.Tensor
    gain: float
    span: float
    ridge: float

    @classmethod
    def of(cls, moment: torch.Tensor | Sketch, ridge: float) -> Whitening:
        """Returns that of a moment; ridge: in units of its mean, what each direction counts as beside its energy."""
        sketch = moment if isinstance(moment, Sketch) else Sketch.of(moment, len(moment))
        width, count = sketch.factor.shape
        is_whole = width == count
        above = sketch.factor.square().sum(0)  # the columns are orthogonal
        values = above + sketch.rest
        trace = values.sum() + (width - count) * sketch.rest
        if not trace:  # nothing was seen
            matrix = torch.eye(width).to(sketch.factor) if is_whole else torch.zeros_like(sketch.factor)
            return cls(matrix, 1.0, 0.0, 0.0)
        mean = trace / width
        inner, outer = ((value / mean + ridge).rsqrt() for value in (values, sketch.rest))
        energy = (values * inner.square()).sum() + (width - count) * sketch.rest * outer.square()
        directions = sketch.factor / above.sqrt().where(above > 0, 1)
        matrix, gain = directions * (1 - inner / outer).clamp(min=0).sqrt(), outer * (trace / energy).sqrt()
        if is_whole:  # one product is cheaper than two
            matrix = gain * (torch.eye(width).to(matrix) - matrix @ matrix.T)
        return cls(matrix, float(gain), float(trace / energy * mean), float(ridge * mean))

    @property
    def numbers(self) -> tuple[float, float, float]:
        """What it is made of beside the matrix, in this order."""
        return self.gain, self.span, self.ridge

    def times(self, A: torch.Tensor) -> torch.Tensor:
        """Returns A R of an A (k, in)."""
        if self.matrix.shape[0] == self.matrix.shape[1]:
            return A @ self.matrix
        return torch.addmm(A, A @ self.matrix, self.matrix.T, beta=self.gain, alpha=-self.gain)

    def moment(self, A: torch.Tensor, AR: torch.Tensor) -> torch.Tensor:
        """Returns A R C R A^T (k, k) without C: R C R = c^2 C (C / mean + ridge I)^(-1) = span I - ridge R^2."""
        return torch.addmm(A @ A.T, AR, AR.T, beta=self.span, alpha=-self.ridge)
