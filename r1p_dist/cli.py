"""The command line `r1p`: `r1p train`, `r1p extend`, `r1p forget`, `r1p dry-run`,
`r1p methods`, `r1p doctor`.

Nothing heavy is imported before it is needed, so that --help and --print-config answer at once.
"""

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from r1p_dist.config import RunConfig
from r1p_dist.doctor import ALLOCATOR_VALUE, ALLOCATOR_VARIABLES, examine
from r1p_dist.errors import EXIT_INTERRUPTED, InputError, Interrupted
from r1p_dist.files import write_atomically
from r1p_dist.recipes import load_config

# Time for rank 0 to print an error that all ranks have, and for the launcher to end the others, before they speak up.
_OTHER_RANKS_WAIT_S = 3.0
_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help shows how)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `r1p` and return its exit code: 0, 1 (doctor found something missing) or 2 (wrong input)."""
    return report_errors(partial(_r1p, sys.argv[1:] if argv is None else argv))


def launcher_main(argv: Sequence[str] | None = None) -> int:
    """Run launchers/train.py, one rank of it, and return its exit code."""
    return report_errors(partial(_launcher, sys.argv[1:] if argv is None else argv))


def _r1p(argv: Sequence[str]) -> int:
    parser = Parser(prog="r1p", description="Distributed continual trainer for vision-language models.")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{train,extend,forget,dry-run,methods,doctor}"
    )
    _add_train_arguments(
        commands.add_parser("train", help="train a recipe on one rank; several: deepspeed launchers/train.py")
    )
    extend = commands.add_parser("extend", help="train more tasks on a finished run, on one rank")
    extend.usage = f"{extend.prog} RUN --task STREAM:TASK [--task ...] [key.sub=value ...]"
    extend.add_argument("run", type=Path, help="folder of the run")
    extend.add_argument("--task", action="append", required=True, help="STREAM:TASK, or STREAM for all its tasks")
    forget = commands.add_parser("forget", help="take one task out of a finished run and evaluate it again")
    forget.add_argument("run", type=Path, help="folder of the run")
    forget.add_argument("task", help="name of the task")
    dry_run = commands.add_parser("dry-run", help="run one rank of any number alone: its memory and collectives")
    dry_run.usage = f"{dry_run.prog} --recipe RECIPE --ranks N [key.sub=value ...] [--batch N] [--json FILE]"
    dry_run.add_argument("--recipe", required=True, help="a name in launchers/recipes or the path of a YAML file")
    dry_run.add_argument("--ranks", type=int, required=True, metavar="N", help="ranks of the run, this one included")
    dry_run.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="samples of a rank in a micro step, in place of the recipe's global batch",
    )
    dry_run.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    commands.add_parser("methods", help="list the methods")
    commands.add_parser("doctor", help="say what this machine has and what it lacks")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "train":
        return _train(parser, arguments, rest)
    if arguments.command == "dry-run":
        return _dry_run(parser, arguments, rest)
    if arguments.command == "extend":
        return _extend(arguments, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "forget":
        return _forget(arguments)
    if arguments.command == "methods":
        return _list_methods()
    return examine()


def _launcher(argv: Sequence[str]) -> int:
    parser = Parser(prog="launchers/train.py", description="Train a recipe; see the head of this file.")
    _add_train_arguments(parser)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # LOCAL_RANK says the same
    arguments, rest = parser.parse_known_args(argv)
    return _train(parser, arguments, rest)


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} --recipe RECIPE [key.sub=value ...] [--print-config]"
    parser.add_argument("--recipe", required=True, help="a name in launchers/recipes or the path of a YAML file")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")


def _train(parser: argparse.ArgumentParser, arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    config = _load(parser, arguments.recipe, rest)
    if arguments.print_config:
        if _rank() == 0:
            print(config.dump(), end="")
        return 0
    from r1p_dist.train import run

    _hint_at_allocator()
    run(config)
    return 0


def _load(parser: argparse.ArgumentParser, recipe: str, rest: Sequence[str]) -> RunConfig:
    # Overrides may stand before, between and after the flags, which argparse's own positionals cannot.
    flags = [argument for argument in rest if argument.startswith("-")]
    if flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return load_config(recipe, rest)


def _dry_run(parser: argparse.ArgumentParser, arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    config = _load(parser, arguments.recipe, rest)
    from r1p_dist.dry_run.render import as_text
    from r1p_dist.dry_run.run import dry_run, set_ranks

    result = dry_run(set_ranks(config, arguments.ranks, arguments.batch), arguments.ranks)
    print(as_text(result))
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(result.as_json(), indent=2) + "\n")
    return 0


def _extend(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    recipe = _config_of(arguments.run)
    tasks = [*load_config(recipe).extend, *arguments.task]
    config = load_config(recipe, [f"run_dir={arguments.run}", f"extend={json.dumps(tasks)}", *rest])
    from r1p_dist.train import run

    run(config)
    return 0


def _forget(arguments: argparse.Namespace) -> int:
    _config_of(arguments.run)
    from r1p_dist.forget import forget

    found = forget(arguments.run, arguments.task)
    width = max(map(len, found["tasks"]))
    for task, before, after in zip(found["tasks"], found["with"], found["without"], strict=True):
        print(f"{task:<{width}}  {before:5.1f} -> {after:5.1f}")
    print(f"without {arguments.task}: {arguments.run / f'without-{arguments.task}'}")
    return 0


def _config_of(run_dir: Path) -> Path:
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"{run_dir}: no config.yaml in it, so this is no run folder")
    return run_dir / "config.yaml"


def _hint_at_allocator() -> None:
    import torch

    unset = [name for name in ALLOCATOR_VARIABLES if name not in os.environ]
    if unset and _rank() == 0 and not torch.accelerator.is_available():
        settings = " ".join(f"{name}={ALLOCATOR_VALUE}" for name in unset)
        print(f"hint: on CPU a training step is up to 3 times faster with {settings} set before the start", flush=True)


def _list_methods() -> int:
    from r1p_dist.method_list import describe_all

    print("\n".join(line for description in describe_all() for line in description.lines()))
    return 0


def report_errors(command: Callable[[], int]) -> int:
    """Returns what the command returns, or prints its error on one line and returns the exit code for it."""
    try:
        return command()
    except Interrupted as error:
        if _rank() == 0:
            print(f"interrupted: {error}", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        print(f"error: {error}; the same command resumes from the last checkpoint", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        # gloo's and NCCL's words; the rank that ended has said why.
        if not any(words in str(error) for words in _LOST_RANK):
            raise
        print(f"error (rank {_rank()}): another rank ended or cannot be reached any more", file=sys.stderr, flush=True)
        return 1
    except InputError as error:
        rank = _rank()
        if rank:
            time.sleep(_OTHER_RANKS_WAIT_S)
        print(f"error: {error}" if rank == 0 else f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        return 2


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
