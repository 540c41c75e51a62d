"""Every key of a configuration with its default and what it means, from the typed tree itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from r1p_dist.config import RunConfig
from r1p_dist.safe_yaml import inline_yaml


@dataclass(frozen=True)
class Section:
    """A section of the tree; the top level's name is empty."""

    name: str
    meaning: str
    keys: "tuple[Key, ...]"


@dataclass(frozen=True)
class Key:
    """A key by its dotted name. default: as YAML, empty where one must be given. choices: all values it may have."""

    name: str
    default: str
    meaning: str
    choices: tuple[str, ...] = ()

    def line(self) -> str:
        values = f" ({', '.join(self.choices)})" if self.choices else ""
        return f"{self.name}={self.default}  {self.meaning}{values}"


def sections() -> list[Section]:
    """Returns the sections of a configuration in their order, the top level first."""
    return list(_sections(RunConfig, ""))


def _sections(model: type[BaseModel], name: str) -> Iterator[Section]:
    inner = {key: _model_in(field.annotation) for key, field in model.model_fields.items()}
    prefix = f"{name}." if name else ""
    keys = (_key(f"{prefix}{key}", field) for key, field in model.model_fields.items() if inner[key] is None)
    yield Section(name, (model.__doc__ or "").strip(), tuple(keys))
    for key, found in inner.items():
        if found is not None:
            yield from _sections(found, f"{prefix}{key}")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _key(name: str, field: FieldInfo) -> Key:
    default = "" if field.is_required() else inline_yaml(_plain(field.default))
    return Key(name, default, " ".join((field.description or "").split()), tuple(_choices(field.annotation)))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _choices(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
        return
    for part in get_args(annotation):
        yield from _choices(part)
