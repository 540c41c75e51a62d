"""Check on one card, without a network and within minutes, that everything works there, and measure how fast it is.

    python tools/gpu_check.py --json card.json
    python tools/gpu_check.py --parts a,c --minutes 5
    python tools/gpu_check.py --device cpu --quick

a  correctness: votes, losses and merged experts equal those of the CPU, for each stage of ZeRO, on one rank and on two
   that share the card; a resumed run ends with the same bits
b  recipes: mini_mtil_smoke and mini_instruct_smoke through the launcher beat zero-shot
c  steps: ViT-B/16, ViT-L/14, ViT-bigG/14 and LLaVA-1.5-7B, random weights, bf16, against the frozen model and PEFT
d  dry run: memory of rank 0 of 64, of ViT-bigG/14 and LLaVA-1.5-7B, against the planner's prediction
e  host waits: a training step never makes the host wait for the card
f  methods: the losses of every shipped method over two tasks equal those of the CPU

Every case runs in a process of its own, so one that fails, hangs or runs out of memory does not end the rest. The time
is shared among the parts; what no longer fits is skipped. A speed never fails the check: what to aim for on an H100 is
printed beside it. --json FILE is written anew after every case. Exit code 0: all that ran passed; 1: something failed;
2: wrong input.

A machine without a network needs this checkout, torch with its CUDA libraries, torchvision, timm and transformers, and
as wheels what tools/gpu_check_wheels.txt lists (7 MB) and tells how to get. Carry them along, and there

    python -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=.:site python tools/gpu_check.py --json card.json
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu_check_parts.case import Case, run_case
from gpu_check_parts.parts import PARTS, SHARES, TITLES, cases

from r1p_dist.errors import InputError, report_errors
from r1p_dist.files import write_atomically


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; return 0 where all that ran passed, 1 where something failed, 2 for wrong input."""
    return report_errors(partial(check, _parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (8)")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, and in which order (a,b,c,d,e,f)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(cuda)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few steps: tries the check itself")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/gpu_check"), help="for runs and logs, emptied first (runs/gpu_check)"
    )
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> int:
    """Runs the parts and prints a line for each; returns the exit code. InputError: an unknown part, no card."""
    parts = arguments.parts.split(",")
    for part in parts:
        if part not in PARTS:
            raise InputError(f"--parts {arguments.parts}: no part {part!r}; there are {', '.join(PARTS)}")
    if arguments.minutes <= 0:
        raise InputError(f"--minutes {arguments.minutes}: must be above zero")
    ends = time.monotonic() + 60 * arguments.minutes
    folder = arguments.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    machine = run_case(
        Case("machine", "gpu_check_parts.machine:describe"), folder, arguments.device, arguments.quick, 120
    )[0]
    if arguments.device == "cuda" and machine.get("card") is None:
        raise InputError("--device cuda: torch sees no card here; --device cpu --quick tries the check itself")
    print(f"{machine.get('card') or machine.get('processor')}, {_words(machine.get('versions', {}))}", flush=True)
    result: dict[str, Any] = {"machine": machine, "quick": arguments.quick, "parts": {}}
    for number, part in enumerate(parts):
        started = time.monotonic()
        share = SHARES[part] / sum(SHARES[other] for other in parts[number:])
        part_ends = started + share * (ends - started)
        found: list[dict[str, Any]] = []
        result["parts"][part] = {"title": TITLES[part], "results": found}
        for case in cases(part, arguments.quick):
            left = part_ends - time.monotonic()
            if left < case.needs_s:
                reason = f"{left:.0f} s left of this part, it needs {case.needs_s:.0f}"
                found.append({"name": case.name, "outcome": "skip", "reason": reason})
            else:
                found += run_case(case, folder, arguments.device, arguments.quick, left)
            result["parts"][part]["outcome"] = outcome(found)
            result["parts"][part]["seconds"] = round(time.monotonic() - started, 1)
            if arguments.json is not None:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(arguments.json, json.dumps(result, indent=1) + "\n")
        print(line(part, result["parts"][part]), flush=True)
    return int(any(part["outcome"] == "FAIL" for part in result["parts"].values()))


def outcome(results: Sequence[dict[str, Any]]) -> str:
    """Returns FAIL where anything failed, SKIPPED where nothing ran, else PASS."""
    outcomes = {result["outcome"] for result in results}
    return "FAIL" if "fail" in outcomes else "SKIPPED" if outcomes <= {"skip"} else "PASS"


def line(name: str, part: dict[str, Any]) -> str:
    """Returns a part's line, and one below it for each of its results."""
    lines = [f"{name} {part['title']:<12} {part['outcome']:<8} {part['seconds']:.0f} s"]
    for result in part["results"]:
        figures = {key: value for key, value in result.items() if key not in ("name", "outcome", "log")}
        lines.append(f"    {result['outcome']:<6} {result['name']}: {_words(figures)}")
    return "\n".join(lines)


def _words(figures: dict[str, Any]) -> str:
    words = []
    for key, value in figures.items():
        if isinstance(value, dict):
            value = f"({_words(value)})"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        words.append(str(value) if key == "reason" else f"{key} {value}")
    return ", ".join(words)


if __name__ == "__main__":
    sys.exit(main())
