"""Coordinates of a layer's input in which past inputs are about alike in all directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from r1p_dist.moments.sketch import Sketch


@dataclass(frozen=True)
class Whitening:
    """R (in, in) = gain * (I - F F^T), symmetric: (C / mean + ridge I)^(-1/2), times what keeps the inputs' energy.

    C is a second moment by its leading directions, mean that of its eigenvalues; tr(R C R) = tr(C). factor: F (in, k).
    gain: ().
    """

    factor: torch.Tensor
    gain: torch.Tensor

    @classmethod
    def of(cls, moment: Sketch, ridge: float) -> Whitening:
        """Returns that of a moment; ridge: in units of its mean, what each direction counts as beside its energy."""
        width, count = moment.factor.shape
        above = moment.factor.square().sum(0)  # the columns are orthogonal
        values = above + moment.rest
        trace = values.sum() + (width - count) * moment.rest
        if not trace:  # nothing was seen
            return cls(torch.zeros_like(moment.factor), torch.ones_like(moment.rest))
        mean = trace / width
        inner, outer = ((value / mean + ridge).rsqrt() for value in (values, moment.rest))
        directions = moment.factor / above.sqrt().where(above > 0, 1)
        energy = (values * inner.square()).sum() + (width - count) * moment.rest * outer.square()
        return cls(directions * (1 - inner / outer).sqrt(), outer * (trace / energy).sqrt())

    @classmethod
    def of_tensor(cls, packed: torch.Tensor) -> Whitening:
        """Takes what `tensor` returned."""
        return cls(packed[:-1], packed[-1, 0])

    def tensor(self) -> torch.Tensor:
        """Returns both as one tensor (in + 1, k), as ranks send it."""
        return torch.cat([self.factor, self.gain.expand(1, self.factor.shape[1])])

    def times(self, A: torch.Tensor) -> torch.Tensor:
        """Returns A R of an A (k, in)."""
        return self.gain * (A - (A @ self.factor) @ self.factor.T)
