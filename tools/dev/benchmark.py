"""Measure what training costs, on this machine, with numbers that anyone can get again.

    python tools/dev/benchmark.py step --model ViT-B-16 --batch 8 --dtype float32 --against limit,peft --pairs 5
    python tools/dev/benchmark.py --help

Machines are noisy: variants run interleaved in one process, and ratios count, not seconds. The results are printed and,
with --json FILE, written there; `table` prints a folder of them as Markdown.
"""

import argparse
import ast
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.arguments import BENCHMARKS

from r1p_dist.doctor import ALLOCATOR_VALUE, ALLOCATOR_VARIABLES
from r1p_dist.errors import report_errors
from r1p_dist.files import write_atomically


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; return 0, or 2 for wrong input."""
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="BENCHMARK")
    for name, add_arguments in BENCHMARKS.items():
        head, _, rest = _docstring(name).partition("\n\n")
        command = commands.add_parser(
            name, help=head, description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--json", type=Path, metavar="FILE", help="write what is printed there, too")
        add_arguments(command)
    return report_errors(partial(_run, parser.parse_args(argv)))


def _run(arguments: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's log stays where it is when DeepSpeed is imported
        module = importlib.import_module(f"benchmarks.{arguments.command}")
    result = module.run(arguments)
    text = result if isinstance(result, str) else json.dumps(result, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.json, text + "\n")
    return 0


def _docstring(name: str) -> str:
    """Returns the head of benchmarks/NAME.py without importing it, so that --help needs no torch."""
    source = Path(__file__).with_name("benchmarks").joinpath(f"{name}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


def _with_allocator_settings() -> None:
    """Starts this program again with the settings that training has; the C library reads them when a process starts."""
    if all(name in os.environ for name in ALLOCATOR_VARIABLES):
        return
    os.environ.update({name: os.environ.get(name, str(ALLOCATOR_VALUE)) for name in ALLOCATOR_VARIABLES})
    os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    _with_allocator_settings()
    sys.exit(main())
