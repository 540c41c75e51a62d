"""Paths of a configuration, resolved where they are written.

A relative path on the command line is one from the working directory; in a file it is looked for beside the file first,
then from the working directory. What is found becomes absolute, so that the folder of a run works from anywhere. Names
that are no path there (of shipped streams, tags, models of a hub) stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from r1p_dist.kinds import kind_names, kind_of

_LOCAL = "local-dir:"  # open_clip's word before a folder
Key = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Marks a text that is a name or a path.

    holds: the file that makes a folder such a place; where it is empty, the place is a file.
    """

    holds: str = ""


class ModelPlace(Place):
    """Marks the name of a model; whether it may be a folder, its section's `kind` says."""


def resolve_places(
    model: type[BaseModel], section: dict[str, Any], at: Key, folders_of: Callable[[Key], Sequence[Path]]
) -> None:
    """Makes the paths in a section absolute, in place. folders_of: where to look for what a key names, in order."""
    for name, field in model.model_fields.items():
        value, here = section.get(name), (*at, name)
        inner = next((kind for kind in _parts(field.annotation) if _is_model(kind)), None)
        if inner is not None and isinstance(value, dict):
            resolve_places(inner, value, here, folders_of)
        place = next((mark for mark in (*field.metadata, *_parts(field.annotation)) if isinstance(mark, Place)), None)
        if isinstance(place, ModelPlace):
            place = _of_model(section.get("kind", model.model_fields["kind"].default), value)
        if place is None:
            continue
        if isinstance(value, str):
            section[name] = _resolved(value, place, folders_of(here))
        elif isinstance(value, list):
            section[name] = [_resolved(one, place, folders_of(here)) if isinstance(one, str) else one for one in value]


def _resolved(text: str, place: Place, folders: Sequence[Path]) -> str:
    """Returns the text with its path made absolute; an entry of `extend` may have a task behind it."""
    if _is_local(text):
        path = Path(text.removeprefix(_LOCAL)).expanduser()
        return _LOCAL + next(
            (str((folder / path).absolute()) for folder in folders if (folder / path).is_dir()), str(path)
        )
    for name, rest in ((text, ""), (text.rpartition(":")[0], text[text.rfind(":") :])):
        for folder in folders if name else ():
            path = (folder / Path(name).expanduser()).absolute()
            if path.is_file() or place.holds and (path / place.holds).is_file():
                return f"{path}{rest}"
    return text


def _of_model(kind: Any, name: Any) -> Place | None:
    """Returns what a model's folder holds; None where its kind's names are names, whatever folder is there."""
    holds = kind_of(kind).model_file if kind in kind_names() else None
    return Place(holds or "") if holds or _is_local(name) else None


def _is_local(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(_LOCAL)


def _parts(annotation: Any) -> Iterator[Any]:
    """Yields an annotation and all that it is made of, marks too."""
    yield annotation
    for part in (*get_args(annotation), *getattr(annotation, "__metadata__", ())):
        yield from _parts(part)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
