"""`r1p backbones`: the models that a library has by name, and whether adapters go on them."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from r1p_dist.arguments import Parser
from r1p_dist.errors import InputError
from r1p_dist.kinds import kind_names, kind_of


class CataloguePart(Protocol):
    """What the part `catalogue` of a kind of backbone holds, where its library has models by name."""

    def lines(self, pattern: str) -> Iterator[str]:
        """Yields a line for each model whose name has the pattern in it, or fits it where it has * or ?."""


def main(prog: str, argv: Sequence[str]) -> int:
    """Prints what models there are, and what of them adapters can serve."""
    parser = Parser(prog=prog, description="List the models of open_clip, and whether adapters go on them.")
    parser.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="part of a name, or one with * and ?")
    pattern = parser.parse_args(argv).pattern
    found = False
    for kind in map(kind_of, kind_names()):
        if kind.has_catalogue:
            catalogue: CataloguePart = kind.part("catalogue")
            for line in catalogue.lines(pattern):
                print(line, flush=True)  # each takes a moment
                found = True
    if not found:
        raise InputError(f"{pattern}: no model has that in its name; {prog} alone lists all")
    return 0
