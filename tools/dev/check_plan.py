"""Hold the planner against dry runs: rank 0 of N makes real steps alone, and what it took is compared with the plan.

    python tools/dev/check_plan.py --model tiny --batch 8 --zero 0,1,2,3
    python tools/dev/check_plan.py --model ViT-B-16 --batch 4 --zero 2,3 --ranks 8,64
    python tools/dev/check_plan.py --model ViT-bigG-14 --depth 2 --batch 2 --zero 2,3 --bucket 5e6

Prints a Markdown table: calls and bytes of all collectives of a step and of a task boundary, and whether those of each
kind are exactly as planned; memory at the peak of a step. --bucket N sets DeepSpeed's reduce_bucket_size, which would
hide everything else of a small model. bf16 is slow on a CPU without arithmetic for it. Exit code 0, or 1 where a
collective differs, or memory by more than a tenth.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from big_model_check import write_clip

from r1p_dist.errors import report_errors
from r1p_dist.files import write_atomically
from r1p_dist.tables import table

if TYPE_CHECKING:  # what is heavy is imported once the arguments are read
    from r1p_dist.planner.comparison import Comparison

TOLERANCE = 0.1
HEAD = ["model", "ranks", "ZeRO", "step calls", "bytes", "boundary calls", "bytes", "plan"]
HEAD += ["memory MB", "planned MB", "ratio"]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and returns the exit code."""
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="tiny or a name of open_clip (tiny)")
    parser.add_argument("--depth", type=int, metavar="N", help="blocks per tower (as many as the model has)")
    parser.add_argument("--ranks", default="8,64,512,4096", metavar="N,…", help="(8,64,512,4096)")
    parser.add_argument("--zero", default="0,1,2,3", metavar="STAGE,…", help="ZeRO stages (0,1,2,3)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="pictures of a rank in a micro step (8)")
    parser.add_argument("--bucket", type=float, default=5e5, metavar="N", help="reduce_bucket_size in numbers (5e5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the recipe mini_mtil_dac")
    return report_errors(partial(_check, parser.parse_intermixed_args(argv)))


def _check(arguments: argparse.Namespace) -> int:
    from r1p_dist.dry_run.ranks import set_ranks
    from r1p_dist.planner.comparison import compare
    from r1p_dist.planner.plan import parse_counts
    from r1p_dist.recipes import load_config

    found: list[Comparison] = []
    with tempfile.TemporaryDirectory() as folder:
        name = arguments.model
        if arguments.depth is not None:
            name = f"local-dir:{write_clip(Path(folder) / 'model', arguments.model, arguments.depth)}"
        for stage in parse_counts("--zero", arguments.zero, range(4)):
            for ranks in parse_counts("--ranks", arguments.ranks):
                own = {"name": name, "pretrained": None}, {"reduce_bucket_size": int(arguments.bucket)}
                overrides = [f"backbone={json.dumps(own[0])}", f"deepspeed.config=zero{stage}"]
                overrides += ["evaluation.batch_size=4", *arguments.overrides]  # no plan is made of evaluations
                overrides.append(f"deepspeed.overrides={json.dumps({'zero_optimization': own[1]})}")
                config = set_ranks(load_config("mini_mtil_dac", overrides), ranks, arguments.batch)
                found.append(compare(config, ranks))
                print(".", end="", file=sys.stderr, flush=True)
    print(table(HEAD, [_row(arguments, comparison) for comparison in found]))
    if arguments.json:
        write_atomically(arguments.json, json.dumps([comparison.as_json() for comparison in found], indent=1) + "\n")
    return int(not all(c.is_exact and abs(c.memory_ratio - 1) <= TOLERANCE for c in found))


def _row(arguments: argparse.Namespace, comparison: "Comparison") -> list[str]:
    name = arguments.model if arguments.depth is None else f"{arguments.model}, {arguments.depth} blocks"
    parts = (comparison.real_step, comparison.real_boundary)
    counts = [f"{sum(kind[of] for kind in part.values()):,}" for part in parts for of in ("calls", "bytes")]
    return [
        name,
        str(comparison.run.ranks),
        str(comparison.stage),
        *counts,
        "exact" if comparison.is_exact else "differs",
        f"{comparison.real_memory / 1e6:,.1f}",
        f"{comparison.memory.total / 1e6:,.1f}",
        f"{comparison.memory_ratio:.3f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
