"""The command line `r1p`: a table of commands, each in a module that is imported when it is chosen.

tools/*.py and launchers/*.py are single commands of it under names of their own.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from r1p_dist.arguments import Parser
from r1p_dist.errors import report_errors


class Command(NamedTuple):
    """A line of `r1p --help`, and the function that gets the program's name and the words behind the command."""

    summary: str
    module: str
    function: str = "main"


COMMANDS = {
    "train": Command(
        "train a recipe on one rank; several: deepspeed launchers/train.py", "r1p_dist.run_commands", "train_recipe"
    ),
    "extend": Command("train more tasks on a finished run, on one rank", "r1p_dist.run_commands", "extend_run"),
    "forget": Command(
        "take one task out of a finished run and evaluate it again", "r1p_dist.run_commands", "forget_task"
    ),
    "watch": Command("show the report of a run while it goes on", "r1p_dist.watch.main"),
    "report": Command("write the report of a run again", "r1p_dist.run_commands", "rewrite_report"),
    "export": Command("write a finished run's model, or its tasks' updates as adapters", "r1p_dist.export.main"),
    "predict": Command("classify pictures, or ask about them, before and after a run", "r1p_dist.predict.main"),
    "serve": Command("serve a page on this machine that predicts pictures", "r1p_dist.serve.main"),
    "compare": Command("run methods with several seeds and tabulate them", "r1p_dist.compare.main"),
    "convert": Command("convert a data set into shards, or check shards", "r1p_dist.data.convert.main"),
    "plan": Command("predict memory, communication and time of a step on any number of GPUs", "r1p_dist.planner.main"),
    "dry-run": Command("run one rank of any number alone: its memory and collectives", "r1p_dist.dry_run.main"),
    "submit": Command("submit a run to a cluster", "r1p_dist.cluster.main"),
    "sweep": Command("submit a recipe at many points", "r1p_dist.cluster.main", "submit_sweep"),
    "status": Command("say how runs stand", "r1p_dist.cluster.main", "print_status"),
    "logs": Command("print what a run's job printed", "r1p_dist.cluster.main", "print_log"),
    "cancel": Command("end the jobs of runs; a run that trains saves first", "r1p_dist.cluster.main", "cancel_jobs"),
    "moments": Command("measure a backbone's layer inputs, an anchor for `method: steady`", "r1p_dist.measuring.main"),
    "backbones": Command("list open_clip's models and whether adapters go on them", "r1p_dist.backbone_list"),
    "methods": Command("list the methods", "r1p_dist.method_list"),
    "config": Command("print the keys of a configuration with their meanings", "r1p_dist.config_command"),
    "completion": Command("complete commands, options, recipes and keys in a shell by TAB", "r1p_dist.completion"),
    "doctor": Command("say what this machine has and what it lacks", "r1p_dist.doctor"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `r1p` and return its exit code: 2 for wrong input; r1p_dist/errors.py has the others."""
    return report_errors(partial(_r1p, _words() if argv is None else argv))


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one command as a program of its own and return its exit code."""
    return report_errors(partial(_run, name, Path(sys.argv[0]).name, _words() if argv is None else argv))


def submit() -> int:
    """Run `r1p-submit`."""
    return run_command("submit")


def _words() -> list[str]:
    """Return the words behind the program's name, or, for a shell that completes them, those before the cursor."""
    if "_ARGCOMPLETE" not in os.environ:
        return sys.argv[1:]
    from r1p_dist.completion import words_before_cursor

    return words_before_cursor()


def _r1p(argv: Sequence[str]) -> int:
    parser = Parser(prog="r1p", description="Distributed continual trainer for vision-language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary, add_help=False)
    name = argv[0] if argv[:1] and argv[0] in COMMANDS else parser.parse_args(argv[:1]).command
    return _run(name, f"r1p {name}", argv[1:])


def _run(name: str, prog: str, argv: Sequence[str]) -> int:
    command = COMMANDS[name]
    return getattr(importlib.import_module(command.module), command.function)(prog, argv)
