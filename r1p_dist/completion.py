"""Print what makes a shell complete r1p's commands, options, recipes and keys with the TAB key.

    eval "$(r1p completion bash)"

Put that line into ~/.bashrc, with the path of r1p where it is not on the PATH; zsh: the same with zsh, in ~/.zshrc
behind compinit; fish: `r1p completion fish | source`, in ~/.config/fish/config.fish. By argcomplete: at each TAB the
shell asks r1p itself, so what it offers is that of the installed version.
"""

import argparse
import os
from collections.abc import Iterable, Sequence

from argcomplete import CompletionFinder, shellcode
from argcomplete.lexers import split_line

from r1p_dist.arguments import Parser, documented_parser

PROGRAMS = ("r1p", "r1p-submit")
_SHELLS = ("bash", "zsh", "fish")


def main(prog: str, argv: Sequence[str]) -> int:
    """Prints the lines for a shell."""
    parser = documented_parser(prog, __doc__)
    parser.add_argument("shell", choices=_SHELLS, metavar="SHELL", help=", ".join(_SHELLS))
    print(shellcode(PROGRAMS, shell=parser.parse_args(argv).shell))
    return 0


def words_before_cursor() -> list[str]:
    """Makes every parser offer completions in place of parsing; returns the finished words behind the program's name.

    To be called where a shell asks (`_ARGCOMPLETE`), before any command reads its arguments.
    """
    Parser.instead = _complete
    return _words()[1:]


def _words() -> list[str]:
    *_, words, _ = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))
    return words


def _complete(parser: Parser, takes_overrides: bool) -> None:
    """Gives the shell what can stand at the cursor, and ends the process."""
    offers = {"recipe": _recipes, "key": _keys}
    for action in parser._actions:
        if action.dest in offers:
            action.completer = offers[action.dest]  # pyright: ignore[reportAttributeAccessIssue]
    # the words of the command itself stand before its arguments
    os.environ["_ARGCOMPLETE"] = str(len(parser.prog.split()))
    (_FinderWithOverrides() if takes_overrides else CompletionFinder())(parser, always_complete_options="long")


class _FinderWithOverrides(CompletionFinder):
    """Offers `key.sub=value` as well, which no parser knows of, wherever an option's value is not awaited."""

    def collect_completions(
        self, active_parsers: list[argparse.ArgumentParser], parsed_args: argparse.Namespace, cword_prefix: str
    ) -> list[str]:
        found = super().collect_completions(active_parsers, parsed_args, cword_prefix)
        option = active_parsers[0]._option_string_actions.get(_words()[-1])
        if option is not None and option.nargs != 0:
            return found
        return [*found, *(word for word in _overrides(cword_prefix) if word.startswith(cword_prefix))]


def _recipes(**_: object) -> Iterable[str]:
    from r1p_dist.shipped import shipped_files

    return shipped_files("recipes", ".yaml")


def _keys(**_: object) -> Iterable[str]:
    from r1p_dist.config_reference import sections

    return [key.name for section in sections() for key in section.keys]


def _overrides(prefix: str) -> Iterable[str]:
    """Returns `key=` for each key, or `key=value` where that key's values are a few."""
    from r1p_dist.config_reference import sections
    from r1p_dist.methods import shipped_methods

    asked, is_begun, _ = prefix.partition("=")
    keys = [key for section in sections() for key in section.keys]
    if not is_begun:
        return [f"{key.name}=" for key in keys]
    choices = {key.name: key.choices for key in keys} | {"method": shipped_methods()}
    return [f"{asked}={choice}" for choice in choices.get(asked, ())]
