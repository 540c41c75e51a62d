"""MLflow: in the store MLFLOW_TRACKING_URI or its own default; experiment MLFLOW_EXPERIMENT_NAME, or the stream."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient
from mlflow.utils.time import get_current_time_millis

from r1p_dist.trackers.tracker import TrackedRun

_LONGEST_VALUE = 6000  # of a parameter
_MOST_PARAMETERS = 100  # of a request


class MLflow:
    """One run of an experiment, found again when ours resumes."""

    def __init__(self, run: TrackedRun) -> None:
        logging.getLogger("alembic").setLevel(logging.WARNING)  # a new local store tells of each of its tables
        self._client = MlflowClient()
        self._run_id = run.identity(lambda: self._begin(run))
        self._client.update_run(self._run_id, status="RUNNING")

    def _begin(self, run: TrackedRun) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", run.stream)
        known = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if known is None else known.experiment_id
        run_id = self._client.create_run(experiment, run_name=run.name).info.run_id
        parameters = [Param(key, str(value)[:_LONGEST_VALUE]) for key, value in run.settings.items()]
        for start in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(run_id, params=parameters[start : start + _MOST_PARAMETERS])
        return run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        # one request: training waits for it
        now = get_current_time_millis()
        self._client.log_batch(self._run_id, [Metric(name, value, now, step) for name, value in values.items()])

    def matrix(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._client.log_dict(self._run_id, dict(metrics), "metrics.json")

    def close(self, metrics: Mapping[str, Any] | None) -> None:
        self._client.set_terminated(self._run_id, "KILLED" if metrics is None else "FINISHED")
