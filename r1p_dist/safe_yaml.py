"""Reads YAML without executing anything, and as people write it: YAML 1.2's words and numbers, no key twice.

YAML 1.1, PyYAML's own, reads 010 as 8, 1:30 as 90, 1e3 as a text and `no` as false. Here a number with a zero in front
is the text that stands there: a name stays itself, and an option that is a number takes its decimal value.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from r1p_dist.errors import InputError
from r1p_dist.files import read_text

_DIGITS = r"(?:0|[1-9][0-9]*(?:_[0-9]+)*)"
_WORDS = {
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (rf"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        rf"[-+]?(?:{_DIGITS}\.[0-9]*|\.[0-9]+|{_DIGITS}(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "merge": ("<<", "<"),
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
}


class _YamlLoader(yaml.SafeLoader):
    """A safe loader that refuses repeated keys."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # the base class refuses it
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} stands there twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0)  # 0x and 0o say their base; no other zero is in front


class _YamlDumper(yaml.SafeDumper):
    """A safe dumper that quotes what either version of YAML would take for something else than text."""


_YamlLoader.add_constructor("tag:yaml.org,2002:int", _YamlLoader.construct_number)
for _tag, (_pattern, _first) in _WORDS.items():
    for _class in (_YamlLoader, _YamlDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), list(_first))


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds, as `parse_yaml`. InputError: it cannot be read or is no such text."""
    return parse_yaml(read_text(path), str(path))


def write_yaml(tree: Any) -> str:
    """Return a tree of mappings, lists and values as YAML that `parse_yaml` reads back; keys keep their order."""
    return yaml.dump(tree, Dumper=_YamlDumper, sort_keys=False, allow_unicode=True)


def inline_yaml(value: Any) -> str:
    """Return a value as YAML on one line, as it is written behind a key."""
    return yaml.dump(value, Dumper=_YamlDumper, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def parse_yaml(text: str, source: str) -> Any:
    """Return what a YAML text holds: only mappings, lists, strings, numbers, booleans and null.

    Raises InputError, one line with `source`, line and column, for anything that is not such a text.
    """
    loader = None
    try:
        loader = _YamlLoader(text)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{source}{where}: not valid YAML: {problem}") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{source}: not valid YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()
