"""What the planner knows of a model: the trace of a micro step, its adapters, and what its loss exchanges.

Each kind of model has a module of its own (clip.py, llava.py) that builds the model on the meta device, runs its
forward on one rank's micro batch, and says what its loss needs of the other ranks.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import nn

from r1p_dist.adapters import LowRankLinear
from r1p_dist.backbones import Backbone
from r1p_dist.config import RunConfig
from r1p_dist.errors import InputError
from r1p_dist.methods import make_method
from r1p_dist.planner.network import Collective
from r1p_dist.planner.trace import Trace


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


@dataclass(frozen=True)
class Adapted:
    """One adapted linear. group: those of equal number vote together. merged: rank-1 experts that a task leaves.

    gate_bytes: of the mean routing probabilities that ranks sum where the router is trained, else 0. held, left: of
    what a group reads, as `LayerPlan` has them. is_recomputed: activation checkpointing runs it a second time.
    """

    name: str
    inputs: int
    outputs: int
    rank: int
    merged: int
    group: int
    gate_bytes: int
    held: int
    left: int
    is_recomputed: bool


@dataclass(frozen=True)
class ModelShape:
    """What the rest of the planner knows of a model. vote: as options.vote, None without a pool."""

    dtype: torch.dtype
    trace: Trace
    adapted: list[Adapted]
    vote: str | None
    loss: Loss

    def count(self, kind: str) -> int:
        """Returns the numbers in parameters of a kind: frozen, router or adapter."""
        return sum(parameter.numel for parameter in self.trace.parameters if parameter.kind == kind)

    @property
    def merged_numel(self) -> int:
        """Numbers in the factors that a finished task leaves."""
        return sum(adapted.merged * (adapted.inputs + adapted.outputs) for adapted in self.adapted)

    @property
    def by_group(self) -> list[Adapted]:
        """One of each group, in order."""
        return list({adapted.group: adapted for adapted in reversed(self.adapted)}.values())[::-1]

    @property
    def pristine_numel(self) -> int:
        """Numbers in the weights that a merge changes, whose first values are kept."""
        return sum(adapted.inputs * adapted.outputs for adapted in self.adapted)


def attach_adapters(config: RunConfig, backbone: Backbone, dtype: torch.dtype) -> list[LowRankLinear]:
    """Puts the method's adapters on a backbone and makes it ready for its trace; returns them.

    InputError: a method that trains nothing.
    """
    method = make_method(config, backbone)
    if not method.trains:
        raise InputError(f"method={config.method}: trains nothing, so there is nothing to plan; use dac or lora")
    adapters = method.adapters
    if not adapters:
        raise InputError(f"method={config.method}: trains the backbone's own weights, which the planner does not know")
    for adapter in adapters:
        adapter.dropout = 0.0  # its masks are drawn from a generator, which the meta device has not
    backbone.to(device="meta", dtype=dtype).train()
    if config.backbone.gradient_checkpointing:
        backbone.checkpoint_blocks()
    return adapters


def make_shape(
    config: RunConfig, backbone: nn.Module, adapters: list[LowRankLinear], trace: Trace, loss: Loss
) -> ModelShape:
    """Returns the shape of a model after its trace, whose forward has left its marks on the adapters' routing."""
    index = {parameter: i for i, parameter in enumerate(backbone.parameters())}
    recomputed = {i for visit in trace.visits if visit.is_recompute for i in trace.parameters_of[visit.module]}
    groups: dict[int, int] = {}
    adapted = [_describe(adapter, groups, index[adapter.A] in recomputed) for adapter in adapters]
    return ModelShape(adapters[0].A.dtype, trace, adapted, adapters[0].plan().vote, loss)


def _describe(adapter: LowRankLinear, groups: dict[int, int], is_recomputed: bool) -> Adapted:
    plan = adapter.plan()
    return Adapted(
        adapter.name,
        adapter.in_features,
        adapter.out_features,
        len(adapter.A),
        plan.merged,
        groups.setdefault(id(plan.voters), len(groups)),
        plan.gate_bytes,
        plan.held,
        plan.left,
        is_recomputed,
    )
