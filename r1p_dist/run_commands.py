"""The commands about one run: train, extend, forget and report."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from r1p_dist.arguments import RECIPE_HELP, Parser, documented_parser, parse_with_overrides
from r1p_dist.errors import InputError, launched_rank
from r1p_dist.run_files import CONFIG_FILE

_REPORT = """Write the report of a run again, and its accuracy matrix as a picture.

    r1p report runs/mini_mtil
    r1p report runs/mini_mtil --matrix docs/accuracy_matrix.png

Reads RUN_DIR/metrics.json, log.jsonl and config.yaml and writes RUN_DIR/report.html.
"""


def train_recipe(prog: str, argv: Sequence[str]) -> int:
    """Trains a recipe, as one rank of as many as the launcher started."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} --recipe RECIPE [key.sub=value ...] [--print-config]",
        description="Train a recipe: one rank of a launcher's, or the only one.",
    )
    parser.add_argument("--recipe", required=True, help=RECIPE_HELP)
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # LOCAL_RANK says the same
    arguments, words = parse_with_overrides(parser, argv)
    from r1p_dist.recipes import load_config

    config = load_config(arguments.recipe, words)
    if arguments.print_config:
        if launched_rank() == 0:
            print(config.dump(), end="")
        return 0
    from r1p_dist.train import run

    _hint_at_allocator()
    run(config)
    return 0


def _hint_at_allocator() -> None:
    import torch

    from r1p_dist.doctor import ALLOCATOR_VALUE, ALLOCATOR_VARIABLES

    unset = [name for name in ALLOCATOR_VARIABLES if name not in os.environ]
    if unset and launched_rank() == 0 and not torch.accelerator.is_available():
        settings = " ".join(f"{name}={ALLOCATOR_VALUE}" for name in unset)
        print(f"hint: on CPU a training step is up to 3 times faster with {settings} set before the start", flush=True)


def extend_run(prog: str, argv: Sequence[str]) -> int:
    """Trains more tasks on a finished run."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} RUN --task STREAM:TASK [--task ...] [key.sub=value ...]",
        description="Train more tasks on a finished run, on one rank.",
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--task", action="append", required=True, help="STREAM:TASK, or STREAM for all its tasks")
    arguments, words = parse_with_overrides(parser, argv)
    from r1p_dist.recipes import load_config

    recipe = _config_of(arguments.run)
    tasks = [*load_config(recipe).extend, *arguments.task]
    config = load_config(recipe, [f"run_dir={arguments.run}", f"extend={json.dumps(tasks)}", *words])
    from r1p_dist.train import run

    run(config)
    return 0


def forget_task(prog: str, argv: Sequence[str]) -> int:
    """Takes one task out of a finished run and prints each task's score with and without it."""
    parser = Parser(prog=prog, description="Take one task out of a finished run and evaluate it again.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("task", help="name of the task")
    arguments = parser.parse_args(argv)
    _config_of(arguments.run)
    from r1p_dist.forget import forget

    found = forget(arguments.run, arguments.task)
    width = max(map(len, found["tasks"]))
    for task, before, after in zip(found["tasks"], found["with"], found["without"], strict=True):
        print(f"{task:<{width}}  {before:5.1f} -> {after:5.1f}")
    print(f"without {arguments.task}: {arguments.run / f'without-{arguments.task}'}")
    return 0


def _config_of(run_dir: Path) -> Path:
    if not (run_dir / CONFIG_FILE).is_file():
        raise InputError(f"{run_dir}: no config.yaml in it, so this is no run folder")
    return run_dir / CONFIG_FILE


def rewrite_report(prog: str, argv: Sequence[str]) -> int:
    """Writes the report of a run again."""
    parser = documented_parser(prog, _REPORT)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--matrix", type=Path, metavar="PNG", help="write the accuracy matrix there too")
    arguments = parser.parse_args(argv)
    from r1p_dist.report import plot_matrix, write_report

    write_report(arguments.run_dir)
    if arguments.matrix:
        plot_matrix(arguments.run_dir, arguments.matrix)
    return 0
