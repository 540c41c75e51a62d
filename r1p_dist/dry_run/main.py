"""The command `r1p dry-run`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from r1p_dist.arguments import RECIPE_HELP, Parser, parse_with_overrides

if TYPE_CHECKING:
    from r1p_dist.config import RunConfig


def main(prog: str, argv: Sequence[str]) -> int:
    """Runs one rank of any number and prints what it took."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} --recipe RECIPE --ranks N [key.sub=value ...] [--batch N] [--json FILE]",
        description="Run one rank of any number alone: its memory and collectives.",
    )
    parser.add_argument("--recipe", required=True, help=RECIPE_HELP)
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="ranks of the run, this one included")
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="samples of a rank in a micro step, in place of the recipe's global batch",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    arguments, words = parse_with_overrides(parser, argv)
    from r1p_dist.dry_run.ranks import set_ranks
    from r1p_dist.recipes import load_config

    def check(config: RunConfig) -> None:
        from r1p_dist.checks import check_run

        check_run(set_ranks(config, arguments.ranks, arguments.batch), arguments.ranks)

    config = set_ranks(load_config(arguments.recipe, words, check), arguments.ranks, arguments.batch)
    from r1p_dist.dry_run.render import as_text
    from r1p_dist.dry_run.run import dry_run
    from r1p_dist.files import write_atomically

    result = dry_run(config, arguments.ranks)
    print(as_text(result))
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(result.as_json(), indent=2) + "\n")
    return 0
