"""The command line of tools/plan.py."""

import argparse
import json
import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from r1p_dist.cli import Parser, report_errors
from r1p_dist.errors import InputError
from r1p_dist.files import write_atomically
from r1p_dist.planner.model import Batch
from r1p_dist.planner.network import NETWORKS, parse_network
from r1p_dist.planner.plan import Question, as_json, make_plan, parse_counts
from r1p_dist.planner.render import as_png, as_text
from r1p_dist.planner.timing import ACCELERATORS, find_accelerator


def main(description: str, argv: Sequence[str]) -> int:
    """Prints a plan; returns 0, or 2 for wrong input."""
    return report_errors(partial(_main, description, argv))


def _main(description: str, argv: Sequence[str]) -> int:
    arguments = _parse(description, argv)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    plan = make_plan(_question(arguments))
    print(as_text(plan))
    if arguments.json:
        write_atomically(arguments.json, json.dumps(as_json(plan), indent=2) + "\n")
    if arguments.plot:
        write_atomically(arguments.plot, as_png(plan))
    return 0


def _parse(description: str, argv: Sequence[str]) -> argparse.Namespace:
    head, _, rest = description.partition("\n\n")
    parser = Parser(prog="plan.py", description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="tiny or a name of open_clip")
    parser.add_argument("--gpus", default="8,64,512,4096", metavar="N,…", help="(8,64,512,4096)")
    parser.add_argument("--zero", default="1,2,3", metavar="STAGE,…", help="ZeRO stages (1,2,3)")
    parser.add_argument("--batch", required=True, type=int, metavar="N", help="pictures per GPU and micro step")
    parser.add_argument("--accumulation", type=int, default=1, metavar="N", help="micro steps per step (1)")
    parser.add_argument("--prompts", type=int, metavar="N", help="distinct prompts among them (one per picture)")
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="of the longest prompt (32)")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"), help="(bf16)")
    parser.add_argument("--device", default="h100", help=f"(h100); {', '.join(ACCELERATORS)}")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB", help="of one GPU (80)")
    parser.add_argument("--usable", type=float, default=0.9, metavar="SHARE", help="of it for training (0.9)")
    parser.add_argument("--utilisation", type=float, default=0.4, metavar="SHARE", help="of the peak in use (0.4)")
    parser.add_argument(
        "--network",
        default="infiniband-400",
        help=f"(infiniband-400); {', '.join(NETWORKS)}, or bandwidth=GB/s,latency=microseconds",
    )
    parser.add_argument("--recipe", default="mini_mtil", help="recipe of pool, targets and DeepSpeed (mini_mtil)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw memory and efficiency")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="laid over the recipe")
    return parser.parse_intermixed_args(argv)


def _question(arguments: argparse.Namespace) -> Question:
    prompts = arguments.batch if arguments.prompts is None else arguments.prompts
    for flag, value, highest in (
        ("--batch", arguments.batch, math.inf),
        ("--accumulation", arguments.accumulation, math.inf),
        ("--prompts", prompts, arguments.batch),
        ("--prompt-tokens", arguments.prompt_tokens, math.inf),
    ):
        if not 1 <= value <= highest:
            limit = "from 1" if highest == math.inf else f"from 1 to --batch {highest}"
            raise InputError(f"{flag} {value}: must be {limit}")
    for flag, value in (("--usable", arguments.usable), ("--utilisation", arguments.utilisation)):
        if not 0 < value <= 1:
            raise InputError(f"{flag} {value}: must be above 0 and at most 1")
    if not 0 < arguments.gpu_memory < math.inf:
        raise InputError(f"--gpu-memory {arguments.gpu_memory}: must be a number of GB above zero")
    return Question(
        arguments.recipe,
        tuple(arguments.overrides),
        arguments.model,
        parse_counts("--gpus", arguments.gpus),
        parse_counts("--zero", arguments.zero, range(4)),
        Batch(arguments.batch, prompts, arguments.prompt_tokens),
        arguments.accumulation,
        arguments.precision,
        arguments.gpu_memory * 1e9,
        arguments.usable,
        parse_network(arguments.network),
        find_accelerator(arguments.device),
        arguments.utilisation,
    )
