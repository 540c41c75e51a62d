"""The plan: every number of accelerators with every ZeRO stage, with and without activation checkpointing."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from r1p_dist.config import RunConfig
from r1p_dist.engine import resolve_deepspeed
from r1p_dist.errors import InputError
from r1p_dist.planner.accelerators import Accelerator
from r1p_dist.planner.communication import boundary_collectives, scan_collectives, step_collectives
from r1p_dist.planner.memory import Memory, checkpoint_bytes, moment_bytes, training_memory
from r1p_dist.planner.model import Batch, ModelShape
from r1p_dist.planner.network import Collectives, Network, cost
from r1p_dist.planner.part import planner_part
from r1p_dist.planner.timing import StepTime, batch_time, boundary_time, scan_seconds, step_seconds
from r1p_dist.planner.zero import Zero
from r1p_dist.recipes import load_config


@dataclass(frozen=True)
class Question:
    """What is asked. memory: bytes of an accelerator; usable: the share of it that a plan may take.

    The rest is for the accelerator's context, communication buffers and gaps of the allocator.
    """

    recipe: str
    overrides: tuple[str, ...]
    model: str
    ranks: tuple[int, ...]
    stages: tuple[int, ...]
    batch: Batch
    micro_steps: int
    precision: str
    memory: float
    usable: float
    network: Network
    accelerator: Accelerator
    utilisation: float

    def config(self, ranks: int, stage: int, checkpointing: bool) -> RunConfig:
        """Returns the run configuration of one setting. InputError: as `load_config`."""
        own = [
            f"backbone.kind={self.batch.kind}",
            f"backbone.name={self.model}",
            "backbone.pretrained=null",
            f"backbone.gradient_checkpointing={str(checkpointing).lower()}",
            f"deepspeed.config=zero{stage}",
            f"train.precision={self.precision}",
            f"train.gradient_accumulation_steps={self.micro_steps}",
            f"train.global_batch_size={ranks * self.batch.samples * self.micro_steps}",
        ]
        return load_config(self.recipe, [*self.overrides, *own])


@dataclass(frozen=True)
class Setting:
    """One line of the plan. step, boundary, scan: collectives of a rank, the last of a global batch that is scanned.

    scan_memory: bytes at the peak of such a batch. boundary_seconds: between two tasks, of the collectives and of all
    scanned batches where their number is known.
    """

    ranks: int
    stage: int
    checkpointing: bool
    memory: Memory
    scan_memory: int
    fits: bool
    step: Collectives
    boundary: Collectives
    scan: Collectives
    time: StepTime
    scan_time: StepTime
    boundary_seconds: float
    samples_per_second: float


@dataclass(frozen=True)
class Plan:
    """The answer. shapes: without and with activation checkpointing. best: per number of ranks, where any fits."""

    question: Question
    shapes: dict[bool, ModelShape]
    settings: list[Setting]
    best: dict[int, Setting]


def make_plan(question: Question) -> Plan:
    """Returns the plan. InputError: an unknown model, key or setting."""
    dtype = torch.bfloat16 if question.precision == "bf16" else torch.float32
    ranks, stage = question.ranks[0], question.stages[0]
    describe = planner_part(question.batch.kind).describe
    shapes = {
        checkpointing: describe(question.config(ranks, stage, checkpointing), question.batch, dtype)
        for checkpointing in (False, True)
    }
    settings = [
        _setting(question, shapes[checkpointing], ranks, stage, checkpointing)
        for ranks in question.ranks
        for stage in question.stages
        for checkpointing in (False, True)
    ]
    best = {}
    for ranks in question.ranks:
        fitting = [setting for setting in settings if setting.ranks == ranks and setting.fits]
        if fitting:  # the fastest; of equals, the smallest
            best[ranks] = max(fitting, key=lambda setting: (setting.samples_per_second, -setting.memory.total))
    return Plan(question, shapes, settings, best)


def _setting(question: Question, shape: ModelShape, ranks: int, stage: int, checkpointing: bool) -> Setting:
    zero = Zero.of(resolve_deepspeed(question.config(ranks, stage, checkpointing), ranks))
    micro_steps, network = question.micro_steps, question.network
    memory = training_memory(shape, zero, ranks, touches_buffers=False)
    scan_memory = memory.total + moment_bytes(shape, ranks)
    step = step_collectives(shape, zero, ranks, micro_steps)
    boundary = boundary_collectives(shape, zero, ranks)
    scan = scan_collectives(shape, zero, ranks, micro_steps)
    accelerator, batch = question.accelerator, micro_steps / question.utilisation  # of a micro step at the peak
    time = batch_time(batch * step_seconds(shape, accelerator), zero, step, ranks, network)
    of_scan = batch_time(batch * scan_seconds(shape, accelerator), zero, scan, ranks, network)
    return Setting(
        ranks,
        stage,
        checkpointing,
        memory,
        scan_memory,
        scan_memory <= question.usable * question.memory,
        step,
        boundary,
        scan,
        time,
        of_scan,
        boundary_time(boundary, ranks, network) + (shape.boundary.batches or 0) * of_scan.total,
        ranks * question.batch.samples * micro_steps / time.total,
    )


def communication_rows(collectives: Collectives, ranks: int, network: Network) -> list[dict[str, Any]]:
    """Returns per kind and purpose: calls, bytes of the whole tensors, and bytes sent and steps as ring and as tree."""
    rows: dict[tuple[str, str], Counter[str]] = {}
    for collective, calls in collectives.items():
        price = cost(collective, ranks, network)
        rows.setdefault((collective.kind, collective.purpose), Counter()).update(
            calls=calls,
            bytes=calls * collective.bytes,
            ring_bytes=round(calls * price.ring_bytes),
            ring_steps=calls * price.ring_steps,
            tree_bytes=round(calls * price.tree_bytes),
            tree_steps=calls * price.tree_steps,
        )
    return [{"kind": kind, "purpose": purpose, **values} for (kind, purpose), values in sorted(rows.items())]


def as_json(plan: Plan) -> dict[str, Any]:
    """Returns the plan as JSON can hold it; bytes and seconds, nothing rounded to a unit."""
    question, plain = plan.question, plan.shapes[False]
    return {
        "model": question.model,
        "precision": question.precision,
        "batch": asdict(question.batch),
        "micro_steps": question.micro_steps,
        "network": asdict(question.network),
        "device": asdict(question.accelerator),
        "utilisation": question.utilisation,
        "parameters": parameters(plain),
        "flops_per_micro_step": {
            "plain": plain.trace.forward_flops + plain.trace.backward_flops,
            "checkpointing": plan.shapes[True].trace.forward_flops + plan.shapes[True].trace.backward_flops,
        },
        "checkpoint_bytes": checkpoint_bytes(plain),
        "scan": {
            "batches": plain.boundary.batches,
            "flops_per_micro_step": plain.scan_flops,
            "moment_flops_per_micro_step": plain.moment_flops,
        },
        "settings": [_as_json(setting, question) for setting in plan.settings],
        "best": {
            str(ranks): {"zero": best.stage, "checkpointing": best.checkpointing} for ranks, best in plan.best.items()
        },
    }


def parameters(shape: ModelShape) -> dict[str, int]:
    """Returns the numbers in parameters: frozen (the backbone), routers, trained, and merged by each task."""
    return {
        "frozen": shape.count("frozen"),
        "routers": shape.count("router"),
        "trained": shape.count("adapter"),
        "merged": shape.merged_numel,
    }


def _as_json(setting: Setting, question: Question) -> dict[str, Any]:
    time = setting.time
    return {
        "gpus": setting.ranks,
        "zero": setting.stage,
        "checkpointing": setting.checkpointing,
        "memory": {**asdict(setting.memory), "total": setting.memory.total},
        "scan_memory": setting.scan_memory,
        "fits": setting.fits,
        "communication": {
            "step": communication_rows(setting.step, setting.ranks, question.network),
            "boundary": communication_rows(setting.boundary, setting.ranks, question.network),
            "scan": communication_rows(setting.scan, setting.ranks, question.network),
        },
        "predicted": {
            **asdict(time),
            "step": time.total,
            "boundary": setting.boundary_seconds,
            "scanned_batch": setting.scan_time.total,
            "samples_per_second": setting.samples_per_second,
            "efficiency": time.efficiency,
        },
    }


def parse_counts(flag: str, text: str, allowed: Sequence[int] | None = None) -> tuple[int, ...]:
    """Returns the whole numbers of a list such as 8,64. InputError: something else, or not one of `allowed`."""
    found = []
    for part in text.split(","):
        value = int(part) if part.strip().isdecimal() else -1
        if value < (0 if allowed else 1) or (allowed and value not in allowed):
            what = f"one of {', '.join(map(str, allowed))}" if allowed else "a whole number from 1"
            raise InputError(f"{flag} {text}: {part!r} must be {what}; write a list such as 1,2")
        found.append(value)
    return tuple(dict.fromkeys(found))
