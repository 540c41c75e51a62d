"""A frozen weight, or rows of one, and what finished tasks merged into it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from r1p_dist.adapters.pristine import file_backed_copy
from r1p_dist.distributed import drop_whole_copy, stored_copies


class Factors(NamedTuple):
    """A low-rank update of some rows of a frozen weight: delta = scaling * B A."""

    A: torch.Tensor  # (k, in)
    B: torch.Tensor  # (rows, k)
    scaling: float
    chosen: torch.Tensor | None = None  # indices of the experts among the k that take part; None = all


class Dense(NamedTuple):
    """A weight as a stage left it, in place of all before. value: the whole tensor, or the parameter that holds it."""

    value: torch.Tensor


Update = Factors | Dense


class MergedWeight:
    """A parameter, or rows of a matrix, whose value is W_0 plus updates. rows: None for all, whatever its shape."""

    def __init__(self, parameter: nn.Parameter, rows: slice | None = None):
        self._parameter, self._rows = parameter, rows
        self._pristine: list[torch.Tensor] = []  # this rank's part of W_0, one per copy that it stores

    @property
    def is_pristine(self) -> bool:
        """Whether nothing was ever merged."""
        return not self._pristine

    @torch.no_grad()
    def keep_pristine(self) -> None:
        """Keeps W_0, before something else than `set` changes the parameter; once."""
        if not self._pristine:
            with stored_copies(self._parameter) as copies:
                slices = [_slice_of_rows(self._parameter, stored, offset, self._rows) for stored, offset in copies]
                self._pristine = [file_backed_copy(flat) for flat, _ in slices]

    @torch.no_grad()
    def set(self, updates: Sequence[Update]) -> None:
        """Writes W = round(W_0 + sum of the updates), in fp32 from the pristine weight, so no error accumulates; a
        dense one takes the place of W_0 and of all before it.

        Under ZeRO-3 each rank computes its own slices of the flattened weight (with ZeRO++ it stores two); there is no
        communication.
        """
        self.keep_pristine()
        weight = self._parameter
        last = max((number for number, update in enumerate(updates) if isinstance(update, Dense)), default=None)
        base = None if last is None else updates[last].value
        factors = updates if last is None else updates[last + 1 :]
        if base is weight and not factors:
            return  # it holds that
        with stored_copies(weight) as copies:
            slices = [_slice_of_rows(weight, stored, offset, self._rows) for stored, offset in copies]
            for (flat, start), pristine in zip(slices, self._pristine, strict=True):
                whole = pristine if base is None else base.reshape(-1)[start : start + len(flat)]
                total = whole.to(flat.device, torch.float32, copy=True)
                if factors and len(flat):
                    total += _flat_delta(factors, start, len(flat)).to(flat.device)
                flat.narrow(0, 0, len(total)).copy_(total)
        drop_whole_copy(weight)


def _slice_of_rows(
    weight: nn.Parameter, stored: torch.Tensor, offset: int, rows: slice | None
) -> tuple[torch.Tensor, int]:
    """Returns what a stored copy holds of the rows: a flat view, and its offset within the rows' flattened elements.

    stored: elements offset … of the flattened weight. The view is empty where it holds none of the rows.
    """
    if rows is None:
        return stored.view(-1), offset
    in_features = getattr(weight, "ds_shape", weight.shape)[1]
    first, last = rows.start * in_features, rows.stop * in_features
    start = min(max(first, offset), last)
    stop = max(min(last, offset + stored.numel()), start)
    return stored.view(-1)[start - offset : stop - offset] if stop > start else stored.new_empty(0), start - first


def _flat_delta(updates: Sequence[Factors], start: int, length: int) -> torch.Tensor:
    """Returns elements start … start + length of the flattened sum of scaling * B A, fp32, as one product."""
    in_features = updates[0].A.shape[1]
    first, last = start // in_features, -(-(start + length) // in_features)
    B = torch.cat([update.scaling * update.B[first:last].float() for update in updates], dim=1)
    A = torch.cat([update.A.float() for update in updates])
    return (B @ A).view(-1)[start - first * in_features :][:length]
