"""All trackers of a run, and what happens when one fails."""

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import accumulate
from typing import Any

from r1p_dist.errors import InputError, one_line
from r1p_dist.trackers.tracker import TrackedRun, Tracker

# name in a recipe -> (module here, class, what must be installed)
_KNOWN = {
    "tensorboard": ("r1p_dist.trackers.tensorboard", "TensorBoard", "tensorboard"),
    "wandb": ("r1p_dist.trackers.wandb", "WeightsAndBiases", "wandb"),
    "mlflow": ("r1p_dist.trackers.mlflow", "MLflow", "mlflow"),
}
_OF_THE_STREAM = ("transfer", "average", "last", "bwt", "forgetting")

_logger = logging.getLogger(__name__)


def check_trackers(names: Sequence[str]) -> None:
    """InputError: a tracker's package is not installed."""
    for name in names:
        package = _KNOWN[name][2]
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"log.trackers={name}: the package {package} is not installed; pip install 'r1p-dist[track]' brings it"
            )


class Trackers:
    """The trackers of a run; one that fails is left out with a warning, for a run is worth more than its curves."""

    def __init__(self, names: Sequence[str], run: TrackedRun, stages: Mapping[str, int]) -> None:
        """run: its `folder` is the run's own. stages: name -> optimizer steps of each, in order."""
        self._ends = list(accumulate(stages.values(), initial=0))
        self._begins = dict(zip(stages, self._ends, strict=False))
        self._rows = 0  # of the matrix, that were shown
        self._metrics: Mapping[str, Any] | None = None
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            self._try(name, lambda name=name: self._trackers.update({name: _make(name, run)}))

    def step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Shows a line of log.jsonl; step: counted within the stage."""
        train = {f"train/{name}": value for name, value in values.items()}
        self._tell(lambda tracker: tracker.scalars(self._begins[stage] + step, train))

    def metrics(self, metrics: Mapping[str, Any]) -> None:
        """Shows the last row of the accuracy matrix, unless it was shown, and what is known of the stream."""
        self._metrics = metrics if metrics["last"] is not None else None
        if len(metrics["accuracy"]) == self._rows:
            return
        self._rows = len(metrics["accuracy"])
        row = dict(zip(metrics["tasks"], metrics["accuracy"][-1], strict=True))
        values = {
            f"{metric or 'accuracy'}/{task}": row[task] for task, metric in zip(row, metrics["metric"], strict=True)
        }
        values |= {f"stream/{name}": metrics[name] for name in _OF_THE_STREAM}
        known = {name: value for name, value in values.items() if value is not None}
        step = self._ends[min(len(metrics["accuracy"]), len(self._ends)) - 1]
        self._tell(lambda tracker: (tracker.scalars(step, known), tracker.matrix(step, metrics)))

    def close(self) -> None:
        """Ends all of them; without the figures of the stream where it was not finished."""
        self._tell(lambda tracker: tracker.close(self._metrics))
        self._trackers.clear()

    def _tell(self, what: Callable[[Tracker], object]) -> None:
        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda tracker=tracker: what(tracker))

    def _try(self, name: str, what: Callable[[], object]) -> None:
        try:
            what()
        except Exception as error:  # of a library, a network or a server: anything
            self._trackers.pop(name, None)
            _logger.warning(
                "log.trackers: %s shows this run no more: %s: %s", name, type(error).__name__, one_line(error)
            )


def _make(name: str, run: TrackedRun) -> Tracker:
    module, kind, _ = _KNOWN[name]
    folder = run.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    return getattr(import_module(module), kind)(replace(run, folder=folder))
