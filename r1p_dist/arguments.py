"""What the parsers of all commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import ClassVar, NoReturn

from r1p_dist.errors import InputError

RECIPE_HELP = "a name in launchers/recipes or the path of a YAML file"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors.

    instead: where a shell asks for completions, what is done with a parser and whether it takes overrides, in place of
    parsing; it ends the process.
    """

    instead: ClassVar[Callable[[Parser, bool], None] | None] = None

    def parse_args(self, args=None, namespace=None):
        if Parser.instead is not None:
            Parser.instead(self, False)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help shows how)")


def documented_parser(prog: str, text: str | None) -> Parser:
    """Returns a parser whose --help has a docstring's first paragraph above the arguments, and the others below."""
    head, _, rest = (text or "").partition("\n\n")
    return Parser(prog=prog, description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse_with_overrides(parser: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the arguments, and the `key.sub=value` words, which may stand before, between and after the flags.

    InputError: a flag that the parser does not know.
    """
    if Parser.instead is not None:
        Parser.instead(parser, True)
    arguments, words = parser.parse_known_args(argv)
    for flag in (word for word in words if word.startswith("-")):
        key, separator, _ = flag.lstrip("-").partition("=")
        hint = f"; write {flag.lstrip('-')}" if separator and key.replace(".", "").isidentifier() else ""
        parser.error(f"unrecognized arguments: {flag}{hint}")
    return arguments, words
