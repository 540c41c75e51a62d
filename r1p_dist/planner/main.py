"""The command line of tools/plan.py. What plans is imported once the arguments are read: --help needs no torch."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from r1p_dist.backbones.llava_shapes import SHAPES
from r1p_dist.cli import Parser, report_errors
from r1p_dist.errors import InputError
from r1p_dist.files import write_atomically
from r1p_dist.planner.accelerators import ACCELERATORS, find_accelerator
from r1p_dist.planner.network import NETWORKS, parse_network
from r1p_dist.recipes import load_config

if TYPE_CHECKING:
    from r1p_dist.planner.model import Batch
    from r1p_dist.planner.plan import Question

# per flag: the kind of model that it is for, its value unless it is given, and its meaning
_SIZES: dict[str, tuple[str, int | None, str]] = {
    "--prompts": ("open_clip", None, "CLIP: distinct prompts in a micro step (one per picture)"),
    "--prompt-tokens": ("open_clip", 32, "CLIP: of the longest prompt (32)"),
    "--tokens": ("llava", 700, "LLaVA: of the longest conversation, with those of its pictures (700)"),
    "--answer-tokens": ("llava", 64, "LLaVA: of them, those of answers (64)"),
    "--pictures": ("llava", 1, "LLaVA: of each conversation (1)"),
}


def main(description: str, argv: Sequence[str]) -> int:
    """Prints a plan; returns 0, or 2 for wrong input."""
    return report_errors(partial(_main, description, argv))


def _main(description: str, argv: Sequence[str]) -> int:
    arguments = _parse(description, argv)
    from r1p_dist.planner.plan import as_json, make_plan
    from r1p_dist.planner.render import as_png, as_text

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
    parser.add_argument("--model", required=True, help=f"tiny, a name of open_clip, {', '.join(SHAPES)}")
    parser.add_argument("--gpus", default="8,64,512,4096", metavar="N,…", help="(8,64,512,4096)")
    parser.add_argument("--zero", default="1,2,3", metavar="STAGE,…", help="ZeRO stages (1,2,3)")
    parser.add_argument("--batch", required=True, type=int, metavar="N", help="samples per GPU and micro step")
    parser.add_argument("--accumulation", type=int, default=1, metavar="N", help="micro steps per step (1)")
    for flag, (_, _, meaning) in _SIZES.items():
        parser.add_argument(flag, type=int, metavar="N", help=meaning)
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
    from r1p_dist.planner.plan import Question, parse_counts

    for flag, value in (("--batch", arguments.batch), ("--accumulation", arguments.accumulation)):
        _check_size(flag, value, 1)
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
        _batch(arguments),
        arguments.accumulation,
        arguments.precision,
        arguments.gpu_memory * 1e9,
        arguments.usable,
        parse_network(arguments.network),
        find_accelerator(arguments.device),
        arguments.utilisation,
    )


def _batch(arguments: argparse.Namespace) -> Batch:
    """Returns a rank's micro batch for the kind of model. InputError: a size of another kind, or out of bounds."""
    from r1p_dist.planner.clip import Pictures
    from r1p_dist.planner.llava import Conversations

    kind = "llava"
    if arguments.model not in SHAPES:
        kind = load_config(arguments.recipe, arguments.overrides).backbone.kind
    sizes = {}
    for flag, (of_kind, default, _) in _SIZES.items():
        value = getattr(arguments, flag.strip("-").replace("-", "_"))
        if value is not None and of_kind != kind:
            own = ", ".join(other for other, (its_kind, _, _) in _SIZES.items() if its_kind == kind)
            raise InputError(f"{flag} {value}: not for {arguments.model}, of backbone.kind={kind}; it has {own}")
        sizes[flag] = default if value is None else value
    if kind == "open_clip":
        sizes["--prompts"] = sizes["--prompts"] or arguments.batch
        _check_size("--prompts", sizes["--prompts"], 1, arguments.batch)
        _check_size("--prompt-tokens", sizes["--prompt-tokens"], 1)
        return Pictures(arguments.batch, sizes["--prompts"], sizes["--prompt-tokens"])
    _check_size("--answer-tokens", sizes["--answer-tokens"], 1)
    _check_size("--pictures", sizes["--pictures"], 0)
    return Conversations(arguments.batch, sizes["--pictures"], sizes["--tokens"], sizes["--answer-tokens"])


def _check_size(flag: str, value: int, lowest: int, batch: int | None = None) -> None:
    if value < lowest or (batch is not None and value > batch):
        limit = f"from {lowest}" if batch is None else f"from {lowest} to --batch {batch}"
        raise InputError(f"{flag} {value}: must be {limit}")
