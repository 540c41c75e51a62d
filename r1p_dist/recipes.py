"""Recipes: from a YAML file, its bases and `key.sub=value` overrides to a run's configuration.

Layers are laid over one another: the bases of a recipe, the recipe, the command line. One that names another method
than those below it drops their `options`, which are that other method's.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from r1p_dist.config import RunConfig, TaskTrainConfig
from r1p_dist.ds_config import load_deepspeed_config
from r1p_dist.errors import InputError
from r1p_dist.key_words import hint_at_key, hint_at_section
from r1p_dist.methods import method_class
from r1p_dist.places import Key, resolve_places
from r1p_dist.safe_yaml import parse_yaml, read_yaml
from r1p_dist.shipped import shipped_files

COMMAND_LINE = "command line"
# Sections of earlier releases, and where their keys are now.
_MOVED = {"pool": "options", "ago": "options.ago", "lora": "options"}


def load_config(
    recipe: str | Path, overrides: Sequence[str] = (), check: Callable[[RunConfig], None] | None = None
) -> RunConfig:
    """Return the configuration of a recipe (a shipped name or a YAML file) with `key.sub=value` overrides.

    check: is called before the method's module, which needs torch, is imported. Raises InputError, one line that names
    file, key and value, for anything that is wrong in them.
    """
    config, origins, path = _read(recipe, overrides)
    if check is not None:
        check(config)
    return _with_options(config, origins, str(path))


def read_config(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return what `load_config` does, but with the method's options as they are written, which needs no torch."""
    return _read(recipe, overrides)[0]


def _read(recipe: str | Path, overrides: Sequence[str]) -> tuple[RunConfig, _Origins, Path]:
    path = _find_recipe(recipe)
    tree, origins = _read_with_bases(path, ())
    words: dict[str, Any] = {}
    for override in overrides:
        _merge(words, _parse_override(override), (), {}, COMMAND_LINE)
    _lay_over(tree, words, origins, COMMAND_LINE)
    tree.setdefault("run_dir", None)
    if tree["run_dir"] is None:
        tree["run_dir"] = str(Path("runs") / path.stem)
    resolve_places(RunConfig, tree, (), partial(_folders, origins))
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise InputError(_describe(error, (), origins, str(path))) from error
    # Read here as well, so that --print-config and every rank find a wrong DeepSpeed key before any work.
    load_deepspeed_config(config.deepspeed.config, config.deepspeed.overrides)
    return config, origins, path


def _with_options(config: RunConfig, origins: _Origins, recipe: str) -> RunConfig:
    """Return the configuration with the options of its method checked and filled in."""
    try:
        method = method_class(config.method)
    except InputError as error:
        raise InputError(f"{_sources(('method',), origins, recipe)}: {error}") from error
    _refuse_unknown_options(config, method.Options, origins, recipe)
    given = copy.deepcopy(config.options)
    resolve_places(method.Options, given, ("options",), partial(_folders, origins))
    try:
        options = method.Options.model_validate(given)
        config = config.model_copy(update={"options": options.model_dump(mode="json")})
        method.check(options, config)
    except ValidationError as error:
        raise InputError(_describe(error, ("options",), origins, recipe)) from error
    except ValueError as error:
        raise InputError(f"{recipe}: {error}") from error
    return config


def _refuse_unknown_options(config: RunConfig, options: type[BaseModel], origins: _Origins, recipe: str) -> None:
    for key, allowed in _unknown_keys(options, config.options, ("options",)):
        nearest = difflib.get_close_matches(key[-1], allowed, n=1)
        hint = f"did you mean {'.'.join((*key[:-1], nearest[0]))}? " if nearest else ""
        raise InputError(
            f"{_sources(key, origins, recipe)}: unknown key {'.'.join(key)} of method={config.method}; {hint}"
            f"allowed: {', '.join(allowed) or 'none'}"
        )


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


_Origins = dict[Key, str]


def _folders(origins: _Origins, key: Key) -> list[Path]:
    """Returns where a path is looked for: beside the file that it is written in, and in the working directory."""
    source = origins.get(key, COMMAND_LINE)
    return [Path()] if source == COMMAND_LINE else [Path(source).parent, Path()]


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], _Origins]:
    if path.resolve() in seen:
        chain = " -> ".join(entry.name for entry in (*seen, path))
        raise InputError(f"{path}: base: the recipes form a circle: {chain}")
    recipe = read_yaml(path)
    if recipe is None:
        recipe = {}
    if not isinstance(recipe, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values, this file holds a {type(recipe).__name__}")
    tree: dict[str, Any] = {}
    origins: _Origins = {}
    if "base" in recipe:
        base = recipe.pop("base")
        if not isinstance(base, str):
            raise InputError(f"{path}: base: {base!r}: must be the name or path of a recipe")
        try:
            base_path = _find_recipe(base, beside=path.parent)
        except InputError as error:
            raise InputError(f"{path}: base: {error}") from error
        tree, origins = _read_with_bases(base_path, (*seen, path.resolve()))
    _lay_over(tree, recipe, origins, str(path))
    return tree, origins


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise InputError(f"{COMMAND_LINE}: {override!r} is not an override; write key.sub=value, as in train.lr=1e-3")
    value = parse_yaml(text, f"{COMMAND_LINE}: {key}")
    for part in reversed(parts):
        value = {part: value}
    return value


def _lay_over(tree: dict[str, Any], over: dict[Any, Any], origins: _Origins, source: str) -> None:
    """Merge `over` into `tree` and note in `origins` where each value came from; unknown keys raise InputError."""
    for section in over.keys() & _MOVED.keys():
        keys = over[section] if isinstance(over[section], dict) and over[section] else {"…": None}
        raise InputError(
            f"{source}: {section}.{next(iter(keys))} has moved: write {_MOVED[section]}.{next(iter(keys))}, which the "
            "chosen method alone reads"
        )
    _refuse_unknown_keys(over, source)
    if "method" in over and over["method"] != tree.get("method", RunConfig.model_fields["method"].default):
        tree.pop("options", None)
        for key in [key for key in origins if key[0] == "options"]:
            del origins[key]
    _merge(tree, over, (), origins, source)


def _merge(tree: dict[str, Any], over: dict[Any, Any], at: tuple[str, ...], origins: _Origins, source: str) -> None:
    for key, value in over.items():
        here = (*at, str(key))
        if isinstance(value, dict):
            if not isinstance(tree.get(str(key)), dict):
                tree[str(key)] = {}
            _merge(tree[str(key)], value, here, origins, source)
        else:
            tree[str(key)] = value
            for below in [entry for entry in origins if entry[: len(here)] == here]:
                del origins[below]
            origins[here] = source


def _refuse_unknown_keys(tree: dict[Any, Any], source: str) -> None:
    for key, allowed in _unknown_keys(RunConfig, tree, ()):
        hint = hint_at_key(key, allowed, _all_keys(RunConfig, ()))
        raise InputError(f"{source}: unknown key {'.'.join(key)}; {hint}allowed: {', '.join(allowed)}")


def _unknown_keys(
    model: type[BaseModel], section: Any, at: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yields the keys of a section that its model does not have, and those that could stand in their place."""
    if not isinstance(section, dict):
        return  # not a section at all: the validation says so, with its type
    for key, value in section.items():
        here = (*at, str(key))
        if key not in model.model_fields:
            yield here, list(model.model_fields)
            continue
        inner = _model_of(model.model_fields[key].annotation)
        if inner is TaskTrainConfig and isinstance(value, dict):
            for task, entry in value.items():
                yield from _unknown_keys(inner, entry, (*here, str(task)))
        elif inner is not None:
            yield from _unknown_keys(inner, value, here)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *get_args(annotation)]
    return next((entry for entry in candidates if isinstance(entry, type) and issubclass(entry, BaseModel)), None)


def _all_keys(model: type[BaseModel], at: tuple[str, ...]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield ".".join((*at, name))
        inner = _model_of(field.annotation)
        if inner is not None and inner is not TaskTrainConfig:
            yield from _all_keys(inner, (*at, name))


def _describe(error: ValidationError, under: tuple[str, ...], origins: _Origins, recipe: str) -> str:
    return "; ".join(_describe_one(entry, under, origins, recipe) for entry in error.errors(include_url=False))


def _describe_one(entry: Any, under: tuple[str, ...], origins: _Origins, recipe: str) -> str:
    at = (*under, *(str(part) for part in entry["loc"]))
    if entry["type"] == "value_error":
        reason = str(entry["ctx"]["error"])
    elif entry["type"] in ("model_type", "dict_type"):
        reason = "must be a mapping of keys to values"
        reason += hint_at_section(at, entry["input"])
    elif entry["type"] in ("list_type", "tuple_type") and isinstance(entry["input"], str | int | float):
        reason = f"must be a list: write {'.'.join(at)}=[{entry['input']}]"
    else:
        reason = entry["msg"]
    where = _sources(at, origins, recipe)
    if isinstance(entry["input"], dict) and entry["type"] == "value_error":
        return f"{where}: {reason}"  # a check over several keys names them and their values itself
    value = repr(entry["input"])
    shown = value if len(value) <= 80 else value[:77] + "..."
    return f"{where}: {'.'.join(at)}={shown}: {reason[0].lower()}{reason[1:]}"


def _sources(at: tuple[str, ...], origins: _Origins, recipe: str) -> str:
    below = [source for key, source in origins.items() if key[: len(at)] == at]
    if below:
        return " and ".join(dict.fromkeys(below))
    return next((origins[at[:length]] for length in range(len(at), 0, -1) if at[:length] in origins), recipe)
