"""Weights & Biases: project WANDB_PROJECT, or r1p_dist; online, or with WANDB_MODE=offline in files to sync later."""

import os
import secrets
from collections.abc import Mapping
from typing import Any

import wandb

from r1p_dist.trackers.tracker import TrackedRun

_LOGIN_TIMEOUT_S = 30  # where nobody is there to answer its question


class WeightsAndBiases:
    """One run of the service, found again when ours resumes."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "r1p_dist"),
            name=run.name,
            group=run.stream,
            id=run.identity(lambda: secrets.token_hex(4)),
            resume="allow",
            config=dict(run.settings),
            dir=str(run.folder),
            settings=wandb.Settings(console="off", silent=True, login_timeout=_LOGIN_TIMEOUT_S),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def matrix(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log({"accuracy_matrix": wandb.Table(list(metrics["tasks"]), list(metrics["accuracy"]))}, step=step)

    def close(self, metrics: Mapping[str, Any] | None) -> None:
        self._run.finish(exit_code=1 if metrics is None else 0)
