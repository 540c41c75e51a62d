"""The numbers of a training in progress: full tensors, whatever the world size and the ZeRO stage were.

Legend: a column is one of value, exp_avg and exp_avg_sq, or one that a method keeps beside them; every trainable
parameter has all of them, flattened, fp32.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from r1p_dist.adapters.low_rank import full_values
from r1p_dist.distributed import (
    drop_whole_copy,
    is_faked,
    rank,
    stored_copies,
    sum_on_first_rank,
    sum_over_ranks,
    world_size,
)
from r1p_dist.errors import InputError
from r1p_dist.optimizer_state import COLUMNS, part_of

# Numbers that ranks other than the first hold at a time, so that a save of billions does not need room for all there.
_PIECE = 64 << 20


class Capture:
    """What one save takes from the running training: reductions to rank 0, then copies that nobody changes.

    parameters: name -> trainable parameter. engine: DeepSpeed's, or None between two tasks, where there are no moments.
    local: uint8, equally long on every rank, kept rank by rank. further: the method's own columns. RuntimeError: a
    number is kept by no rank or by two.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        engine: Any | None,
        local: torch.Tensor,
        further: Sequence[str] = (),
    ) -> None:
        self.shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
        self._columns = (*COLUMNS, *further) if engine is not None else COLUMNS[:1]
        sizes = [len(self._columns) * shape.numel() for shape in self.shapes.values()]
        *self._starts, end = itertools.accumulate(sizes, initial=0)
        self._buffer = torch.empty(end, dtype=torch.int32) if rank() == 0 else None
        device = next(iter(parameters.values())).device
        place = 0
        for names in _pieces(self.shapes):
            piece = self._take({name: parameters[name] for name in names}, engine, device)
            if rank() == 0:
                self._buffer[place : place + len(piece)] = piece
            place += len(piece)
        locals_ = torch.zeros(world_size(), len(local), dtype=torch.uint8, device=device)
        locals_[rank()] = local.to(device)
        self._locals = sum_on_first_rank(locals_).cpu()

    def _take(self, parameters: Mapping[str, nn.Parameter], engine: Any | None, device: torch.device) -> torch.Tensor:
        """Returns these parameters' columns, whole on rank 0 alone."""
        sizes = [len(self._columns) * self.shapes[name].numel() for name in parameters]
        *starts, end = itertools.accumulate(sizes, initial=0)
        # As bits, so that the sum of one rank's numbers and the others' zeros is exact in every case.
        buffer = torch.zeros(end, dtype=torch.int32, device=device)
        given = torch.zeros(len(sizes), dtype=torch.int64)
        for place, ((name, parameter), start) in enumerate(zip(parameters.items(), starts, strict=True)):
            size = self.shapes[name].numel()
            if engine is None:
                values = full_values(parameter)[0].view(-1)
                parts = [(0, values)] if rank() == 0 else []
            else:
                part = part_of(engine, parameter, self._columns)
                is_mine = part is not None and (rank() == 0 or engine.zero_optimization_stage() > 0)
                columns = enumerate(part.columns.values()) if is_mine else ()
                parts = [(number * size + part.start, values) for number, values in columns]
            for offset, values in parts:
                buffer[start + offset : start + offset + len(values)] = values.float().view(torch.int32)
                given[place] += len(values)
        if not is_faked() and sum_over_ranks(given).tolist() != sizes:  # else what no rank gave would look like zeros
            odd = next(name for name, count, size in zip(parameters, given, sizes, strict=True) if count != size)
            raise RuntimeError(f"{odd}: the ranks' parts do not make a whole")
        return sum_on_first_rank(buffer)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns NAME.COLUMN -> full tensor; on rank 0."""
        found = {}
        for (name, shape), start in zip(self.shapes.items(), self._starts, strict=True):
            size = shape.numel()
            for number, column in enumerate(self._columns):
                words = self._buffer[start + number * size :][:size]
                found[f"{name}.{column}"] = words.view(torch.float32).view(shape)
        return found

    def locals(self) -> torch.Tensor:
        """Returns what each rank gave as `local`, (ranks, bytes) uint8; on rank 0."""
        return self._locals


def _pieces(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    """Yields the names in order, as many at a time as have some `_PIECE` numbers together."""
    names: list[str] = []
    for name, shape in shapes.items():
        if names and sum(shapes[other].numel() for other in names) + shape.numel() > _PIECE:
            yield names
            names = []
        names.append(name)
    yield names


@torch.no_grad()
def restore_values(
    parameters: Mapping[str, nn.Parameter],
    engine: Any | None,
    tensors: Mapping[str, torch.Tensor],
    where: str,
    further: Sequence[str] = (),
) -> None:
    """Writes full tensors, as `Capture.tensors` named them, into this rank's parts of the parameters.

    InputError: a tensor is missing, left over, or of another shape; nothing is written then.
    """
    columns = (*COLUMNS, *further) if engine is not None else COLUMNS[:1]
    expected = {f"{name}.{column}": parameters[name] for name in parameters for column in columns}
    if expected.keys() != tensors.keys():
        odd = sorted(expected.keys() ^ tensors.keys())
        raise InputError(f"{where}: holds other tensors than this model trains, for example {odd[0]}")
    for name, parameter in expected.items():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if tensors[name].shape != shape or tensors[name].dtype != torch.float32:
            raise InputError(f"{where}: {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}, not {shape}")
    for name, parameter in parameters.items():
        part = None if engine is None else part_of(engine, parameter, columns)
        if part is not None:
            for column in columns:
                part.fill(column, tensors[f"{name}.{column}"])
        write_stored(parameter, tensors[f"{name}.value"])


def write_stored(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Writes a full tensor into what this rank stores of a parameter, in the model's precision."""
    value = value.view(-1)
    with torch.no_grad(), stored_copies(parameter) as copies:
        for stored, offset in copies:
            piece = value[offset : offset + stored.numel()]
            stored.view(-1)[: len(piece)].copy_(piece)
    drop_whole_copy(parameter)
