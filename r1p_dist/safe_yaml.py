"""Reads YAML without executing anything, and stricter than PyYAML: a key that stands twice is an error."""

import re
from typing import Any

import yaml

from r1p_dist.errors import InputError


class _YamlLoader(yaml.SafeLoader):
    """A safe loader that refuses repeated keys and reads 1e-3 as a number, as YAML 1.2 does."""

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


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """Return what a YAML text holds: only mappings, lists, strings, numbers, booleans, dates and null.

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
