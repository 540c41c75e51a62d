"""Plan a run before it is paid for: memory, communication and predicted time of a step on any number of GPUs.

    r1p plan --model ViT-bigG-14 --gpus 8,64,512,4096 --gpu-memory 80 --batch 32 --zero 1,2,3
    r1p plan --model ViT-L-14 --gpus 16 --batch 64 --network bandwidth=12.5,latency=20 options.vote=lagged
    r1p plan --model llava-1.5-13b --gpus 8,64,512,4096 --batch 8 --tokens 700 --answer-tokens 64
    r1p plan --model FOLDER --gpus 16 --batch 8 --recipe coin

Everything comes from shapes on the meta device, the run configuration and the DeepSpeed configuration: nothing is
downloaded, allocated or trained, and no counter of a run is read. Memory and bytes follow the code and were checked
against real runs of up to four ranks; times are predictions. docs/planner.md lists the assumptions.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from r1p_dist.arguments import documented_parser
from r1p_dist.errors import InputError
from r1p_dist.kinds import Kind, kind_names, kind_of
from r1p_dist.planner.accelerators import ACCELERATORS, find_accelerator
from r1p_dist.planner.network import NETWORKS, parse_network

if TYPE_CHECKING:
    from r1p_dist.planner.model import Batch
    from r1p_dist.planner.plan import Question

_KINDS = [kind_of(name) for name in reversed(kind_names())]


def main(prog: str, argv: Sequence[str]) -> int:
    """Prints a plan."""
    arguments = _parse(prog, argv)
    from r1p_dist.files import write_atomically
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


def _parse(prog: str, argv: Sequence[str]) -> argparse.Namespace:
    parser = documented_parser(prog, __doc__)
    shapes = [shape for kind in _KINDS for shape in kind.shapes]
    parser.add_argument("--model", required=True, help=f"tiny, a name of open_clip, a folder, {', '.join(shapes)}")
    parser.add_argument("--gpus", default="8,64,512,4096", metavar="N,…", help="(8,64,512,4096)")
    parser.add_argument("--zero", default="1,2,3", metavar="STAGE,…", help="ZeRO stages (1,2,3)")
    parser.add_argument("--batch", required=True, type=int, metavar="N", help="samples per GPU and micro step")
    parser.add_argument("--accumulation", type=int, default=1, metavar="N", help="micro steps per step (1)")
    for kind in _KINDS:
        for flag, (_, meaning) in kind.sizes.items():
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
    parser.add_argument(
        "--recipe", default="mini_mtil_dac", help="recipe of pool, targets and DeepSpeed (mini_mtil_dac)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw memory and efficiency")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="laid over the recipe")
    return parser.parse_intermixed_args(argv)


def _question(arguments: argparse.Namespace) -> Question:
    from r1p_dist.planner.part import check_size
    from r1p_dist.planner.plan import Question, parse_counts

    for flag, value in (("--batch", arguments.batch), ("--accumulation", arguments.accumulation)):
        check_size(flag, value, 1)
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


def _holds(kind: Kind, folder: Path) -> bool:
    return kind.model_file is not None and (folder / kind.model_file).is_file()


def _batch(arguments: argparse.Namespace) -> Batch:
    """Returns a rank's micro batch for the kind of model. InputError: a size of another kind, or out of bounds."""
    from r1p_dist.planner.part import planner_part
    from r1p_dist.recipes import load_config

    named = [kind for kind in _KINDS if arguments.model in kind.shapes or _holds(kind, Path(arguments.model))]
    own = named[0] if named else kind_of(load_config(arguments.recipe, arguments.overrides).backbone.kind)
    sizes = {}
    for kind in _KINDS:
        for flag, (default, _) in kind.sizes.items():
            value = getattr(arguments, flag.strip("-").replace("-", "_"))
            if kind is own:
                sizes[flag] = default if value is None else value
            elif value is not None:
                raise InputError(
                    f"{flag} {value}: not for {arguments.model}, of backbone.kind={own.name}; it has "
                    f"{', '.join(own.sizes)}"
                )
    return planner_part(own.name).micro_batch(arguments.batch, sizes)
