"""The commands about one run: train, extend, forget and report."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from r1p_dist.arguments import RECIPE_HELP, Parser, documented_parser, parse_with_overrides
from r1p_dist.errors import InputError, launched_rank
from r1p_dist.files import read_text
from r1p_dist.output import noise_in
from r1p_dist.run_files import CONFIG_FILE, LAUNCH_LOG, REPORT_FILE, STATUS_FILE

if TYPE_CHECKING:
    from r1p_dist.config import RunConfig

_REPORT = """Write the report of a run again, and its accuracy matrix as a picture.

    r1p report runs/mini_mtil
    r1p report runs/mini_mtil --matrix docs/accuracy_matrix.png

Reads what is in RUN_DIR, and the pictures of the test shards where they are still there, and writes
RUN_DIR/report.html. A run writes it itself after every task; `r1p watch` shows it while the run goes on.
"""


def train_recipe(prog: str, argv: Sequence[str]) -> int:
    """Trains a recipe, as a rank of a launcher or on the ranks of this machine that are asked for."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} --recipe RECIPE [--ranks N] [key.sub=value ...] [--print-config] [-v]",
        description="Train a recipe, on one rank of this machine or several, or as a rank of a launcher.",
    )
    parser.add_argument("--recipe", required=True, help=RECIPE_HELP)
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks on this machine (1, or those of a launcher)")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("-v", "--verbose", action="store_true", help=f"print what else goes to RUN/{LAUNCH_LOG}")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # LOCAL_RANK says the same
    arguments, words = parse_with_overrides(parser, argv)
    ranks = _ranks(arguments.ranks)
    from r1p_dist.config import RunConfig
    from r1p_dist.recipes import load_config

    if ranks > 1 and "RANK" not in os.environ and not arguments.print_config:
        _check(RunConfig.load(arguments.recipe, words), ranks)
        from r1p_dist.local_ranks import run_ranks

        flags = ["-v"] if arguments.verbose else []
        command = [sys.executable, "-m", "r1p_dist", "train", "--recipe", arguments.recipe, *flags, *words]
        return run_ranks(command, ranks)
    config = load_config(arguments.recipe, words, partial(_check, ranks=ranks))
    if arguments.print_config:
        if launched_rank() == 0:
            print(config.dump(), end="")
        return 0
    _train(config, arguments.verbose)
    return 0


def _check(config: RunConfig, ranks: int) -> None:
    from r1p_dist.checks import check_run

    check_run(config, ranks)


def _ranks(asked: int | None) -> int:
    """Returns how many ranks the run has. InputError: an impossible number, or not that of the launcher."""
    launched = os.environ.get("WORLD_SIZE") if "RANK" in os.environ else None
    if asked is not None and (asked < 1 or launched not in (None, str(asked))):
        here = f"; the launcher started {launched}" if launched else ""
        raise InputError(f"--ranks {asked}: must be a number from 1{here}")
    return int(launched or asked or 1)


def _train(config: RunConfig, verbose: bool = False) -> None:
    """Trains, with what libraries print in a file of the run's folder."""
    if _is_finished(config):
        if launched_rank() == 0:
            report = config.run_dir / REPORT_FILE
            print(f"{config.run_dir}: this run is finished; report: {report}; resume=never starts it over")
        return
    _hint_at_allocator()
    with nullcontext() if verbose else noise_in(config.run_dir / LAUNCH_LOG):
        from r1p_dist.train import run

        run(config)


def _is_finished(config: RunConfig) -> bool:
    """Returns whether the run folder holds this very run, to its end."""
    run_dir = config.run_dir
    if config.resume != "auto" or not (run_dir / STATUS_FILE).is_file() or not (run_dir / CONFIG_FILE).is_file():
        return False
    from r1p_dist.checkpoint.checkpoints import config_differences
    from r1p_dist.recipes import load_config

    before = load_config(run_dir / CONFIG_FILE)
    state = json.loads(read_text(run_dir / STATUS_FILE))["state"]
    return state == "finished" and before.extend == config.extend and not config_differences(before, config)


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
    words = [f"run_dir={arguments.run}", f"extend={json.dumps(tasks)}", *words]
    _train(load_config(recipe, words, partial(_check, ranks=1)))
    return 0


def forget_task(prog: str, argv: Sequence[str]) -> int:
    """Takes one task out of a finished run and prints each task's score with and without it."""
    parser = Parser(prog=prog, description="Take one task out of a finished run and evaluate it again.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("task", help="name of the task")
    arguments = parser.parse_args(argv)
    _config_of(arguments.run)
    with noise_in(arguments.run / LAUNCH_LOG):
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
    from r1p_dist.report.write import plot_matrix, write_report

    write_report(arguments.run_dir)
    if arguments.matrix:
        plot_matrix(arguments.run_dir, arguments.matrix)
    return 0
