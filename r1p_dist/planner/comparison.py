"""The planner held against a dry run of the same configuration: what it predicted, and what rank 0 of N really took."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch

from r1p_dist.config import RunConfig
from r1p_dist.dry_run.run import DryRun, dry_run
from r1p_dist.engine import choose_precision, resolve_deepspeed
from r1p_dist.planner.clip import Pictures, build_clip, describe_clip
from r1p_dist.planner.communication import boundary_collectives, step_collectives
from r1p_dist.planner.memory import Memory, training_memory
from r1p_dist.planner.network import Collectives
from r1p_dist.planner.zero import Zero


@dataclass(frozen=True)
class Comparison:
    """bytes: of a step and of a task boundary, by kind of collective; memory: of a rank at the peak of a step."""

    run: DryRun
    stage: int
    step: dict[str, int]
    boundary: dict[str, int]
    memory: Memory

    @property
    def real_step(self) -> dict[str, int]:
        return _bytes(self.run, "step")

    @property
    def real_boundary(self) -> dict[str, int]:
        return _bytes(self.run, "boundary")

    @property
    def real_memory(self) -> int:
        return self.run.phases["step"].memory["total"]

    @property
    def is_payload_exact(self) -> bool:
        return (self.step, self.boundary) == (self.real_step, self.real_boundary)

    @property
    def memory_ratio(self) -> float:
        """Predicted over real."""
        return self.memory.total / self.real_memory

    def as_json(self) -> dict[str, Any]:
        plan = {"step": self.step, "boundary": self.boundary, "memory": asdict(self.memory)}
        return {"dry_run": self.run.as_json(), "plan": plan}


def compare(config: RunConfig, ranks: int) -> Comparison:
    """Runs rank 0 of a CLIP run alone, and plans the same. config: with a global batch for so many ranks."""
    run = dry_run(config, ranks)
    zero = Zero.of(resolve_deepspeed(config, ranks))
    dtype = torch.bfloat16 if choose_precision(config)[0] == "bf16" else torch.float32
    batch = Pictures(run.batch["samples"], run.batch["texts"], run.batch["tokens"])
    shape = describe_clip(config, build_clip(config.backbone), batch, dtype)
    return Comparison(
        run,
        zero.stage,
        _sums(step_collectives(shape, zero, ranks, config.train.gradient_accumulation_steps)),
        _sums(boundary_collectives(shape, zero, ranks)),
        training_memory(shape, zero, ranks, touches_buffers=False),
    )


def _sums(collectives: Collectives) -> dict[str, int]:
    found: Counter[str] = Counter()
    for collective, calls in collectives.items():
        found[collective.kind] += calls * collective.bytes
    return dict(sorted(found.items()))


def _bytes(run: DryRun, phase: str) -> dict[str, int]:
    return {kind: counts["bytes"] for kind, counts in run.phases[phase].collectives.items()}
