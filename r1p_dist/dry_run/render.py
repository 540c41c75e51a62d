"""A dry run as Markdown tables."""

from r1p_dist.dry_run.probe import KINDS
from r1p_dist.dry_run.run import DryRun
from r1p_dist.tables import table


def as_text(run: DryRun) -> str:
    """Returns the result, with what it is not."""
    facts, batch = run.as_json(), run.batch
    return "\n\n".join(
        [
            f"Rank 0 of {run.ranks:,}, alone: {facts['method']}, {facts['model']}, ZeRO {facts['zero_stage']}, "
            f"{facts['precision']}, {run.device}. Each rank has {batch['samples']} samples in a micro step, so "
            f"the global batch is {facts['global_batch_size']:,}; the step has {batch['texts']} distinct texts of "
            f"{batch['tokens']} tokens.",
            "Nothing was sent: a gather returned this rank's own values for every rank. So all numbers that the run "
            "computed (losses, accuracies, votes) are meaningless. Shapes, memory and collectives are those of a run.",
            "Peak memory of a rank in MB, by kind. The step is the third of a task; boundary: merge, and the engine of "
            "the next task; evaluation: one batch.",
            _memory_table(run),
            "Collectives of a rank, MB of the whole tensors:",
            _collectives_table(run),
        ]
    )


def _memory_table(run: DryRun) -> str:
    kinds = [*KINDS, "total"]
    has_allocator = any(phase.allocator for phase in run.phases.values())
    rows = []
    for name, phase in run.phases.items():
        sizes = [phase.memory[kind] for kind in kinds] + ([phase.allocator] if has_allocator else [])
        rows.append([name, *(f"{size / 1e6:,.2f}" for size in sizes)])
    return table(["phase", *kinds, *(["allocator"] if has_allocator else [])], rows)


def _collectives_table(run: DryRun) -> str:
    rows = [
        [name, kind, f"{count['calls']:,}", f"{count['bytes'] / 1e6:,.3f}"]
        for name, phase in run.phases.items()
        for kind, count in phase.collectives.items()
    ]
    return table(["phase", "collective", "calls", "MB"], rows)
