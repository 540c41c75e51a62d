"""The configuration of a run with the options of its method, checked by the method's own class."""

import copy
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from r1p_dist.config import RunConfig
from r1p_dist.errors import InputError
from r1p_dist.methods import method_class
from r1p_dist.places import resolve_places
from r1p_dist.recipe_files import Origins, read_recipe, unknown_keys


def load_config(
    recipe: str | Path, overrides: Sequence[str] = (), check: Callable[[RunConfig], None] | None = None
) -> RunConfig:
    """Return the configuration of a recipe (a shipped name or a YAML file) with `key.sub=value` overrides.

    check: is called before the method's module, which needs torch, is imported. Raises InputError, one line that names
    file, key and value, for anything that is wrong in them.
    """
    config, origins = read_recipe(RunConfig, recipe, overrides)
    if check is not None:
        check(config)
    try:
        method = method_class(config.method)
    except InputError as error:
        raise InputError(f"{origins.sources(('method',))}: {error}") from error
    _refuse_unknown_options(config, method.Options, origins)
    given = copy.deepcopy(config.options)
    resolve_places(method.Options, given, ("options",), origins.folders)
    try:
        options = method.Options.model_validate(given)
        config = config.model_copy(update={"options": options.model_dump(mode="json")})
        method.check(options, config)
    except ValidationError as error:
        raise InputError(origins.describe(error, ("options",))) from error
    except ValueError as error:
        raise InputError(f"{origins.recipe}: {error}") from error
    return config


def _refuse_unknown_options(config: RunConfig, options: type[BaseModel], origins: Origins) -> None:
    for key, allowed in unknown_keys(options, config.options, ("options",)):
        nearest = difflib.get_close_matches(key[-1], allowed, n=1)
        hint = f"did you mean {'.'.join((*key[:-1], nearest[0]))}? " if nearest else ""
        raise InputError(
            f"{origins.sources(key)}: unknown key {'.'.join(key)} of method={config.method}; {hint}"
            f"allowed: {', '.join(allowed) or 'none'}"
        )
