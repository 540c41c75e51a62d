"""What an export needs to know of a kind of backbone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from r1p_dist.config import BackboneConfig
from r1p_dist.export.finished_run import FinishedRun, TaskUpdate
from r1p_dist.export.merged import FrozenWeights
from r1p_dist.kinds import kind_of


class HfModel(Protocol):
    """A run's model in the words of transformers.

    model_class: the class of transformers that loads it. base_name: the hub's name of the base model, if any.
    """

    model_class: str
    base_name: str | None

    def module(self, layer: str) -> str:
        """Returns the module of that class that an adapted layer (tower.block.layer) is."""

    def write(self, folder: Path, tasks: Sequence[TaskUpdate], dtype: torch.dtype | None) -> None:
        """Writes the model with the updates of these tasks, and its model card.

        dtype: what the weights are rounded to; None: the kind's own choice.
        """


class ExportPart(Protocol):
    """What the part `export` of a kind of backbone holds.

    WRITERS: by the name of a library that can load the merged model, beside transformers: what writes a folder for it.
    """

    WRITERS: Mapping[str, Callable[[Path, FinishedRun, torch.dtype | None], None]]

    def frozen_weights(self, config: BackboneConfig) -> FrozenWeights:
        """Returns the pristine weights. InputError: they cannot be had."""

    def hf_model(self, run: FinishedRun) -> HfModel:
        """Returns the model of a run. InputError: transformers cannot express it."""


def export_part(config: BackboneConfig) -> ExportPart:
    """Returns the part of the kind of backbone that a configuration names."""
    return kind_of(config.kind).part("export")
