"""A run's model in the words of transformers, whatever kind of backbone it has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from r1p_dist.export.finished_run import FinishedRun, TaskUpdate
from r1p_dist.export.hf_clip_folder import HfClip
from r1p_dist.export.hf_llava_folder import HfLlava


class HfModel(Protocol):
    """model_class: the class of transformers that loads it. base_name: the hub's name of the base model, if any."""

    model_class: str
    base_name: str | None

    def module(self, layer: str) -> str:
        """Returns the module of that class that an adapted layer (tower.block.layer) is."""

    def write(self, folder: Path, tasks: Sequence[TaskUpdate], dtype: torch.dtype | None) -> None:
        """Writes the model with the updates of these tasks, and its model card.

        dtype: what the weights are rounded to; None: the kind's own choice.
        """


def hf_model(run: FinishedRun) -> HfModel:
    """Returns the model of a run. InputError: transformers cannot express it."""
    return HfLlava(run) if run.config.backbone.kind == "llava" else HfClip(run)
