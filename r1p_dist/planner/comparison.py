"""The planner held against a dry run of the same configuration: what it predicted, and what rank 0 of N really took."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from r1p_dist.config import RunConfig
from r1p_dist.dry_run.run import DryRun, dry_run
from r1p_dist.engine import resolve_deepspeed
from r1p_dist.planner.communication import boundary_collectives, step_collectives
from r1p_dist.planner.memory import Memory, training_memory
from r1p_dist.planner.network import Collectives
from r1p_dist.planner.part import planner_part
from r1p_dist.planner.zero import Zero
from r1p_dist.precision import precision_type


@dataclass(frozen=True)
class Comparison:
    """step, boundary: planned calls and bytes by kind of collective; memory: planned for the peak of a step."""

    run: DryRun
    stage: int
    step: dict[str, dict[str, int]]
    boundary: dict[str, dict[str, int]]
    memory: Memory

    @property
    def real_step(self) -> dict[str, dict[str, int]]:
        return self.run.phases["step"].collectives

    @property
    def real_boundary(self) -> dict[str, dict[str, int]]:
        return self.run.phases["boundary"].collectives

    @property
    def real_memory(self) -> int:
        return self.run.phases["step"].memory["total"]

    @property
    def is_exact(self) -> bool:
        """Whether all collectives are as planned, calls and bytes of each kind."""
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
    dtype = precision_type(config.train.precision)
    planner = planner_part(config.backbone.kind)
    sizes = {"--prompts": run.batch["texts"], "--prompt-tokens": run.batch["tokens"]}
    shape = planner.describe(config, planner.micro_batch(run.batch["samples"], sizes), dtype)
    return Comparison(
        run,
        zero.stage,
        _sums(step_collectives(shape, zero, ranks, config.train.gradient_accumulation_steps)),
        _sums(boundary_collectives(shape, zero, ranks)),
        training_memory(shape, zero, ranks, touches_buffers=False),
    )


def _sums(collectives: Collectives) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for collective, calls in collectives.items():
        found.setdefault(collective.kind, Counter()).update(calls=calls, bytes=calls * collective.bytes)
    return {kind: dict(counts) for kind, counts in sorted(found.items())}
