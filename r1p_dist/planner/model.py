"""What the planner knows of a model: the trace of a micro step, its adapters, and what its loss and method exchange.

Each kind of model has a module of its own (clip.py, llava.py) that builds the model on the meta device, runs its
forward on one rank's micro batch, and says what its loss needs of the other ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from r1p_dist.adapters import LowRankLinear, recorded
from r1p_dist.backbones import Backbone
from r1p_dist.config import RunConfig
from r1p_dist.errors import InputError
from r1p_dist.methods import make_method
from r1p_dist.planner.network import Collective
from r1p_dist.planner.trace import Trace, trace_step
from r1p_dist.protocol import BoundaryPlan, Method
from r1p_dist.protocol.trainer import Need
from r1p_dist.protocol.watchers import modules_that_run


class Batch(Protocol):
    """One rank's micro batch; `str` describes it. kind: as backbone.kind. sample: what one is called."""

    kind: ClassVar[str]
    sample: ClassVar[str]

    @property
    def samples(self) -> int: ...


class Loss(Protocol):
    """What a loss takes beside the forward that is traced."""

    def bytes(self, ranks: int) -> int:
        """Returns the memory of the loss and its backward at their highest."""

    def micro_step(self, stage: int, ranks: int) -> list[Collective]:
        """Returns the collectives of a micro step on several ranks; stage: of ZeRO."""

    def step(self) -> list[Collective]:
        """Returns the further collectives of an optimizer step on several ranks."""

    def scan(self, needs: Need, stage: int, ranks: int) -> list[Collective]:
        """Returns the collectives of a micro batch that is scanned, on several ranks; needs: as of a `Watcher`."""


@dataclass(frozen=True)
class Adapted:
    """One adapted linear. group: those of equal number vote together. merged: rank-1 experts that a task leaves.

    gate_bytes: of the mean routing probabilities that ranks sum where the router is trained, else 0. rows: of its input
    in a micro step, (rows, inputs). weight: the place of the frozen weight among the parameters. is_recomputed:
    activation checkpointing runs it a second time.
    """

    name: str
    inputs: int
    outputs: int
    rank: int
    merged: int
    group: int
    gate_bytes: int
    rows: int
    weight: int
    is_recomputed: bool


@dataclass(frozen=True)
class ModelShape:
    """What the rest of the planner knows of a model. vote: as options.vote, None without a pool.

    boundary: of the method. known_bytes: of what every rank keeps in training of past tasks.
    """

    dtype: torch.dtype
    trace: Trace
    adapted: list[Adapted]
    vote: str | None
    loss: Loss
    boundary: BoundaryPlan
    known_bytes: int

    def count(self, kind: str) -> int:
        """Returns the numbers in parameters of a kind: frozen, router or adapter."""
        return sum(parameter.numel for parameter in self.trace.parameters if parameter.kind == kind)

    @property
    def merged_numel(self) -> int:
        """Numbers in the factors that a finished task leaves."""
        return sum(adapted.merged * (adapted.inputs + adapted.outputs) for adapted in self.adapted)

    @property
    def left_numel(self) -> int:
        """Numbers in what a finished task leaves beside them."""
        return sum(sum(read.left.values()) for read in self.boundary.inputs)

    @property
    def scan_flops(self) -> int:
        """Operations of the model on a micro batch that the method scans after a task."""
        if self.boundary.needs is None:
            return 0
        return self.trace.forward_flops + (self.boundary.needs != "forward") * self.trace.backward_flops

    @property
    def moment_flops(self) -> int:
        """Operations of the second moments of such a micro batch, fp32."""
        rows = {adapted.name: adapted.rows for adapted in self.adapted}
        return sum(moment.flops(rows[read.layer]) for read in self.boundary.inputs for moment in read.moments)

    @property
    def pristine_numel(self) -> int:
        """Numbers in the weights that a merge changes, whose first values are kept."""
        return sum(adapted.inputs * adapted.outputs for adapted in self.adapted)


def attach_method(config: RunConfig, backbone: Backbone, dtype: torch.dtype) -> Method:
    """Puts the method's adapters on a backbone and makes it ready for its trace; returns the method.

    InputError: a method that trains nothing.
    """
    method = make_method(config, backbone)
    if not method.trains:
        raise InputError(f"method={config.method}: trains nothing, so there is nothing to plan; use dac or lora")
    if not method.adapters:
        raise InputError(f"method={config.method}: trains the backbone's own weights, which the planner does not know")
    for adapter in method.adapters:
        adapter.dropout = 0.0  # its masks are drawn from a generator, which the meta device has not
    backbone.to(device="meta", dtype=dtype).train()
    if config.backbone.gradient_checkpointing:
        backbone.checkpoint_blocks()
    return method


def make_shape(method: Method, forward: Callable[[], Sequence[torch.Tensor]], loss: Loss) -> ModelShape:
    """Returns the shape of a method's model by the trace of a micro step after the first task.

    forward: as of `trace_step`. It leaves its marks on the adapters' routing.
    """
    backbone, adapters = method.backbone, method.adapters
    known, rows = method.plan_past(), dict[str, int]()
    for name, module in modules_that_run(backbone, adapters).items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: rows.update({name: inputs[0].shape[:-1].numel()}))

    def with_penalties() -> list[torch.Tensor]:
        with recorded(adapters) as penalties:
            outputs = list(forward())
        return [*outputs, *penalties.values()]

    trace = trace_step(backbone, with_penalties, known)
    index = {parameter: i for i, parameter in enumerate(backbone.parameters())}
    recomputed = {i for visit in trace.visits if visit.is_recompute for i in trace.parameters_of[visit.module]}
    groups: dict[int, int] = {}
    adapted = [_describe(adapter, groups, rows[adapter.name], index, recomputed) for adapter in adapters]
    known_bytes = sum(tensor.nbytes for tensor in known)
    vote = adapters[0].plan().vote
    return ModelShape(adapters[0].A.dtype, trace, adapted, vote, loss, method.plan_boundary(), known_bytes)


def _describe(
    adapter: LowRankLinear,
    groups: dict[int, int],
    rows: int,
    index: dict[torch.nn.Parameter, int],
    recomputed: set[int],
) -> Adapted:
    plan = adapter.plan()
    return Adapted(
        adapter.name,
        adapter.in_features,
        adapter.out_features,
        len(adapter.A),
        plan.merged,
        groups.setdefault(id(plan.voters), len(groups)),
        plan.gate_bytes,
        rows,
        index[adapter.weight],
        index[adapter.A] in recomputed,
    )
