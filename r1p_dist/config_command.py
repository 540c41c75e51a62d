"""`r1p config`: prints the keys of a configuration."""

from collections.abc import Sequence

from r1p_dist.arguments import Parser
from r1p_dist.errors import InputError


def main(prog: str, argv: Sequence[str]) -> int:
    """Prints the keys that were asked for."""
    parser = Parser(prog=prog, description="Print the keys of a configuration, with their defaults and meanings.")
    parser.add_argument(
        "key", nargs="?", metavar="KEY", help="a key or a section, such as train.lr or data; default: all"
    )
    asked = parser.parse_args(argv).key
    from r1p_dist.config_reference import sections
    from r1p_dist.key_words import hint_at_key

    keys = [key for section in sections() for key in section.keys]
    chosen = [key for key in keys if asked is None or key.name == asked or key.name.startswith(f"{asked}.")]
    if not chosen:
        hint = hint_at_key(asked.split("."), [], [key.name for key in keys])
        raise InputError(f"{prog}: no key {asked}; {hint}without a key all are printed")
    print("\n".join(key.line() for key in chosen))
    return 0
