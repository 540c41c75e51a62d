"""Kinds of backbone, a folder each: `NAME/` holds all that is of the kind NAME, and nothing else knows its name.

A folder's `KIND` says what there is to know without the kind's libraries. Its parts, modules of fixed names, are
imported when they are asked for; the room that uses a part says what it must hold: `backbone` in
r1p_dist.backbones.load, `catalogue` in r1p_dist.backbone_list, `evaluation` in r1p_dist.evaluation.make, `export` in
r1p_dist.export.part, `files` in r1p_dist.checks, `own_loop` in r1p_dist.backbones.hosts, `planner` in
r1p_dist.planner.part and `predict` in r1p_dist.predict.part.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Kind:
    """A kind of backbone, the value of `backbone.kind`.

    towers, layers: what adapters can be put on. default_towers: those that get some unless others are named.
    even_towers: the towers that run as often on every rank, whatever its samples are. has_answers: samples are
    conversations with answers, not pictures with classes. unknown: keys of the section `backbone` that it does not
    have, with what to do instead. made_from, pipeline, notice: what a model card says of it; the last is the section of
    NOTICE.md on the shipped model. sizes: of a planned micro batch, by flag: the value unless it is given (None: it
    depends on others), and the meaning. shapes: names of models that can be planned without their files. model_file:
    what makes a folder a model whose path can be its name; None where a path has a word before it. has_catalogue: there
    is a part `catalogue`, for the library has models by name. libraries: how the modules' names begin whose classes of
    models can be of this kind.
    """

    name: str
    towers: tuple[str, ...]
    default_towers: tuple[str, ...]
    layers: tuple[str, ...]
    even_towers: tuple[str, ...]
    has_answers: bool
    made_from: str
    pipeline: str
    notice: str
    sizes: Mapping[str, tuple[int | None, str]]
    libraries: tuple[str, ...]
    unknown: Mapping[str, str] = field(default_factory=dict)
    shapes: tuple[str, ...] = ()
    model_file: str | None = None
    has_catalogue: bool = False

    def part(
        self,
        name: Literal["backbone", "catalogue", "evaluation", "export", "files", "own_loop", "planner", "predict"],
    ) -> Any:
        """Imports a part of the kind's folder."""
        return importlib.import_module(f"{__name__}.{self.name}.{name}")


def kind_names() -> list[str]:
    """Returns the names of the kinds in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def kind_of(name: str) -> Kind:
    """Returns the kind of that name, one of `kind_names`."""
    return importlib.import_module(f"{__name__}.{name}").KIND
