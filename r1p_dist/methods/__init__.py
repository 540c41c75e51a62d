"""The methods, one file each: `NAME.py` holds the class of the method NAME, and nothing else knows its name.

Methods of other packages come through the entry points `r1p_dist.methods`, or as `package.module:Class`.
"""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from r1p_dist.errors import InputError, one_line

if TYPE_CHECKING:
    from r1p_dist.backbones import Backbone
    from r1p_dist.config import RunConfig
    from r1p_dist.protocol import Method

ENTRY_POINTS = "r1p_dist.methods"
# `Method.inference` in words.
INFERENCE_NEEDS = {"merged": "merged weights alone", "task_id": "the task of each sample", "routed": "a router"}


def shipped_methods() -> list[str]:
    """Returns the names of the methods in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def installed_methods() -> dict[str, EntryPoint]:
    """Returns the methods that other packages bring, by name. A shipped name stays the shipped one's."""
    shipped = shipped_methods()
    return {point.name: point for point in entry_points(group=ENTRY_POINTS) if point.name not in shipped}


def method_names() -> Sequence[str]:
    """Returns the names that `method` can have beside `package.module:Class`."""
    return [*shipped_methods(), *sorted(installed_methods())]


def check_method_name(name: str) -> None:
    """InputError: there is no method of that name; imports none."""
    if name not in shipped_methods() and name not in installed_methods() and ":" not in name:
        nearest = difflib.get_close_matches(name, method_names(), n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise InputError(
            f"method={name}: no such method{hint}; there are {', '.join(method_names())}, and package.module:Class"
        )


def method_class(name: str) -> "type[Method]":
    """Returns the class of a method. InputError: there is none of that name, or its module cannot be imported."""
    if name in shipped_methods():
        return _class_of(importlib.import_module(f"{__name__}.{name}"))
    check_method_name(name)
    point = installed_methods().get(name) or EntryPoint(name, name, ENTRY_POINTS)
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise InputError(f"method={name}: {point.value} cannot be imported: {one_line(error)}") from error
    from r1p_dist.protocol import Method

    if not (isinstance(found, type) and issubclass(found, Method)):
        raise InputError(
            f"method={name}: {point.value} is no class of a method, a subclass of r1p_dist.protocol.Method"
        )
    return found


def _class_of(module) -> "type[Method]":
    """Returns the one class of a method that a module defines."""
    from r1p_dist.protocol import Method

    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    assert len(own) == 1, f"{module.__name__} must define one method, found {own}"
    return own[0]


def make_method(config: "RunConfig", backbone: "Backbone") -> "Method":
    """Puts the method that a run's configuration names on the backbone. InputError: an unknown one."""
    return method_class(config.method)(config, backbone)
