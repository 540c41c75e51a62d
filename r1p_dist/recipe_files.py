"""Recipe files: from a YAML file, its bases and `key.sub=value` overrides to a checked configuration.

Layers are laid over one another: the bases of a recipe, the recipe, the command line. One that names another method
than those below it drops their `options`, which are that other method's.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from r1p_dist.errors import InputError
from r1p_dist.key_words import hint_at_key, hint_at_section
from r1p_dist.places import Key, resolve_places
from r1p_dist.safe_yaml import parse_yaml, read_yaml
from r1p_dist.shipped import shipped_files

COMMAND_LINE = "command line"
# Sections of earlier releases, and where their keys are now.
_MOVED = {"pool": "options", "ago": "options.ago", "lora": "options"}
_Model = TypeVar("_Model", bound=BaseModel)


class Origins:
    """Where every key of a configuration was written; `recipe` stands for those that nobody wrote."""

    def __init__(self, recipe: Path) -> None:
        self.recipe = str(recipe)
        self._sources: dict[Key, str] = {}

    def note(self, key: Key, source: str) -> None:
        self.drop(key)
        self._sources[key] = source

    def drop(self, key: Key) -> None:
        """Forgets a key and those below it."""
        for below in [entry for entry in self._sources if entry[: len(key)] == key]:
            del self._sources[below]

    def sources(self, at: Key) -> str:
        """Returns where a key was written, or the keys of a section."""
        below = [source for key, source in self._sources.items() if key[: len(at)] == at]
        if below:
            return " and ".join(dict.fromkeys(below))
        above = (at[:length] for length in range(len(at), 0, -1))
        return next((self._sources[key] for key in above if key in self._sources), self.recipe)

    def folders(self, key: Key) -> list[Path]:
        """Returns where a path is looked for: beside the file that it is written in, and in the working directory."""
        source = self._sources.get(key, COMMAND_LINE)
        return [Path()] if source == COMMAND_LINE else [Path(source).parent, Path()]

    def describe(self, error: ValidationError, under: Key = ()) -> str:
        """Returns what is wrong in the configuration or in a section of it, with key, value and source."""
        return "; ".join(self._describe(entry, under) for entry in error.errors(include_url=False))

    def _describe(self, entry: Any, under: Key) -> str:
        at = (*under, *(str(part) for part in entry["loc"]))
        if entry["type"] == "value_error":
            if isinstance(entry["ctx"]["error"], InputError):
                return str(entry["ctx"]["error"])  # of a file of its own, which it names
            reason = str(entry["ctx"]["error"])
        elif entry["type"] in ("model_type", "dict_type"):
            reason = "must be a mapping of keys to values"
            reason += hint_at_section(at, entry["input"])
        elif entry["type"] in ("list_type", "tuple_type") and isinstance(entry["input"], str | int | float):
            reason = f"must be a list: write {'.'.join(at)}=[{entry['input']}]"
        else:
            reason = entry["msg"]
        if isinstance(entry["input"], dict) and entry["type"] == "value_error":
            return f"{self.sources(at)}: {reason}"  # a check over several keys names them and their values itself
        value = repr(entry["input"])
        shown = value if len(value) <= 80 else value[:77] + "..."
        return f"{self.sources(at)}: {'.'.join(at)}={shown}: {reason[0].lower()}{reason[1:]}"


def read_recipe(model: type[_Model], recipe: str | Path, overrides: Sequence[str]) -> tuple[_Model, Origins]:
    """Returns a recipe (a shipped name or a YAML file) with its overrides, checked by the model of a configuration.

    InputError: one line that names file, key and value for anything that is wrong in them.
    """
    path = _find_recipe(recipe)
    origins = Origins(path)
    tree = _read_with_bases(model, path, (), origins)
    words: dict[str, Any] = {}
    for override in overrides:
        _merge(words, _parse_override(override))
    _lay_over(model, tree, words, origins, COMMAND_LINE)
    if tree.get("run_dir") is None:
        tree["run_dir"] = str(Path("runs") / path.stem)
    resolve_places(model, tree, (), origins.folders)
    try:
        return model.model_validate(tree), origins
    except ValidationError as error:
        raise InputError(origins.describe(error)) from error


def _find_recipe(recipe: str | Path, beside: Path | None = None) -> Path:
    shipped = shipped_files("recipes", ".yaml")
    if isinstance(recipe, str) and recipe in shipped:
        return shipped[recipe]
    path = Path(recipe) if beside is None else beside / recipe
    if path.is_file():
        return path
    nearest = difflib.get_close_matches(str(recipe), shipped, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise InputError(f"recipe {str(recipe)!r}: no file and no shipped recipe; {hint}shipped: {', '.join(shipped)}")


def _read_with_bases(model: type[BaseModel], path: Path, seen: tuple[Path, ...], origins: Origins) -> dict[str, Any]:
    if path.resolve() in seen:
        chain = " -> ".join(entry.name for entry in (*seen, path))
        raise InputError(f"{path}: base: the recipes form a circle: {chain}")
    recipe = read_yaml(path)
    if recipe is None:
        recipe = {}
    if not isinstance(recipe, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values, this file holds a {type(recipe).__name__}")
    tree: dict[str, Any] = {}
    if "base" in recipe:
        base = recipe.pop("base")
        if not isinstance(base, str):
            raise InputError(f"{path}: base: {base!r}: must be the name or path of a recipe")
        try:
            base_path = _find_recipe(base, beside=path.parent)
        except InputError as error:
            raise InputError(f"{path}: base: {error}") from error
        tree = _read_with_bases(model, base_path, (*seen, path.resolve()), origins)
    _lay_over(model, tree, recipe, origins, str(path))
    return tree


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise InputError(f"{COMMAND_LINE}: {override!r} is not an override; write key.sub=value, as in train.lr=1e-3")
    value = parse_yaml(text, f"{COMMAND_LINE}: {key}")
    for part in reversed(parts):
        value = {part: value}
    return value


def _lay_over(
    model: type[BaseModel], tree: dict[str, Any], over: dict[Any, Any], origins: Origins, source: str
) -> None:
    """Merges `over` into `tree` and notes where each value came from. InputError: unknown keys."""
    for section in over.keys() & _MOVED.keys():
        keys = over[section] if isinstance(over[section], dict) and over[section] else {"…": None}
        raise InputError(
            f"{source}: {section}.{next(iter(keys))} has moved: write {_MOVED[section]}.{next(iter(keys))}, which the "
            "chosen method alone reads"
        )
    for key, allowed in unknown_keys(model, over, ()):
        hint = hint_at_key(key, allowed, _all_keys(model, ()))
        raise InputError(f"{source}: unknown key {'.'.join(key)}; {hint}allowed: {', '.join(allowed)}")
    if "method" in over and over["method"] != tree.get("method", model.model_fields["method"].default):
        tree.pop("options", None)
        origins.drop(("options",))
    for key in _merge(tree, over):
        origins.note(key, source)


def _merge(tree: dict[str, Any], over: dict[Any, Any], at: Key = ()) -> list[Key]:
    """Merges `over` into `tree` and returns the keys that it wrote."""
    written = []
    for key, value in over.items():
        name = str(key)
        if isinstance(value, dict):
            if not isinstance(tree.get(name), dict):
                tree[name] = {}
            written += _merge(tree[name], value, (*at, name))
        else:
            tree[name] = value
            written.append((*at, name))
    return written


def unknown_keys(model: type[BaseModel], section: Any, at: Key) -> Iterator[tuple[Key, list[str]]]:
    """Yields the keys of a section that its model does not have, and those that could stand in their place."""
    if not isinstance(section, dict):
        return  # not a section at all: the validation says so, with its type
    for key, value in section.items():
        here = (*at, str(key))
        if key not in model.model_fields:
            yield here, list(model.model_fields)
            continue
        annotation = model.model_fields[key].annotation
        inner = _model_of(annotation)
        if inner is not None and get_origin(annotation) is dict and isinstance(value, dict):
            for name, entry in value.items():
                yield from unknown_keys(inner, entry, (*here, str(name)))
        elif inner is not None:
            yield from unknown_keys(inner, value, here)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *get_args(annotation)]
    return next((entry for entry in candidates if isinstance(entry, type) and issubclass(entry, BaseModel)), None)


def _all_keys(model: type[BaseModel], at: Key) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield ".".join((*at, name))
        inner = _model_of(field.annotation)
        if inner is not None and get_origin(field.annotation) is not dict:
            yield from _all_keys(inner, (*at, name))
