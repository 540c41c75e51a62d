"""Measure what training costs, on this machine, with numbers that anyone can get again.

    python tools/benchmark.py step --model ViT-B-16 --batch 8 --dtype float32 --against limit,peft --pairs 5
    python tools/benchmark.py --help

Machines are noisy: variants run interleaved in one process, and ratios count, not seconds. The results are printed and,
with --json FILE, written there; `table` prints a folder of them as Markdown.
"""

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from r1p_dist.doctor import ALLOCATOR_VALUE, ALLOCATOR_VARIABLES
from r1p_dist.errors import InputError
from r1p_dist.files import write_atomically

BENCHMARKS = ("step", "launches", "precision", "inference", "tasks", "scaling", "data", "checkpoint", "table")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; return 0, or 2 for wrong input."""
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="BENCHMARK")
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's log stays where it is when DeepSpeed is imported
        modules = {name: importlib.import_module(f"benchmarks.{name}") for name in BENCHMARKS}
    for name, module in modules.items():
        head, _, rest = module.__doc__.partition("\n\n")
        command = commands.add_parser(
            name, help=head, description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--json", type=Path, metavar="FILE", help="write what is printed there, too")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    try:
        result = arguments.run(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = result if isinstance(result, str) else json.dumps(result, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.json, text + "\n")
    return 0


def _with_allocator_settings() -> None:
    """Starts this program again with the settings that training has; the C library reads them when a process starts."""
    if all(name in os.environ for name in ALLOCATOR_VARIABLES):
        return
    os.environ.update({name: os.environ.get(name, str(ALLOCATOR_VALUE)) for name in ALLOCATOR_VARIABLES})
    os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    _with_allocator_settings()
    sys.exit(main())
