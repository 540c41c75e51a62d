"""What the folder of a run says, read whole, at any moment of the run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from r1p_dist.data.stream import Stream, Task
from r1p_dist.errors import InputError
from r1p_dist.evaluation.score_matrix import ScoreMatrix
from r1p_dist.files import read_mapping
from r1p_dist.run_files import (
    ANSWERS_FILE,
    CONFIG_FILE,
    CORRECT_FILE,
    LOG_FILE,
    METRICS_FILE,
    STATUS_FILE,
    TASKS_FILE,
)
from r1p_dist.safe_yaml import read_yaml

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class RunFiles:
    """The files of a run; what is missing is empty. config: the mapping of config.yaml, config_text the file itself."""

    folder: Path
    metrics: dict[str, Any]
    log: Records
    correct: Records
    answers: Records
    status: dict[str, Any]
    config: dict[str, Any]
    config_text: str

    @classmethod
    def read(cls, folder: Path, is_begun: bool = False) -> "RunFiles":
        """Reads a folder. is_begun: take one without a metrics.json, whose run has evaluated nothing yet.

        InputError: metrics.json is missing or is not a run's metrics.
        """
        path = folder / METRICS_FILE
        metrics = _without_metrics(folder) if is_begun and not path.is_file() else _read_metrics(path)
        config_text, config = "", None
        if (folder / CONFIG_FILE).is_file():
            config_text, config = (folder / CONFIG_FILE).read_text(encoding="utf-8"), read_yaml(folder / CONFIG_FILE)
        return cls(
            folder,
            metrics,
            *(_read_lines(folder / name) for name in (LOG_FILE, CORRECT_FILE, ANSWERS_FILE)),
            status=read_mapping(folder / STATUS_FILE),
            config=config if isinstance(config, dict) else {},
            config_text=config_text,
        )

    @cached_property
    def matrix(self) -> ScoreMatrix:
        return ScoreMatrix.read(self.metrics)

    @cached_property
    def tasks(self) -> Mapping[str, Task]:
        """The tasks of the run's stream with their shards, by name; none where the stream is gone or is not known."""
        try:
            stream = Stream.load(self.config["stream"], self.config.get("order"), self.config.get("tasks"))
            return {task.name: task for task in stream.extended(self.config.get("extend") or []).tasks}
        except (InputError, KeyError, TypeError):
            return {}

    @property
    def has_ended(self) -> bool:
        """Whether the run says that it is finished, stopped or failed; one that says nothing is over."""
        return self.status.get("state", "finished") in ("finished", "stopped", "failed")

    def results(self, name: str) -> dict[tuple[int, str], Any]:
        """Returns what correct.jsonl has under `name` by (row, task), of the rows that metrics.json has."""
        return {
            (record["row"], record["task"]): record[name]
            for record in self.correct
            if name in record and record.get("row", -1) in range(len(self.matrix.trained) + 1)
        }


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; a report is made from the folder of a run that evaluated once") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); was it edited?") from None
    for key in ("tasks", "accuracy"):
        if not isinstance(metrics, dict) or not isinstance(metrics.get(key), list):
            raise InputError(f"{path}: key {key} is missing or no list; this is not the metrics.json of a run")
    return metrics


def _without_metrics(folder: Path) -> dict[str, Any]:
    tasks = read_mapping(folder / TASKS_FILE).get("tasks", [])
    return {
        "tasks": [task["name"] for task in tasks],
        "metric": [task.get("metric", "accuracy") for task in tasks],
        "accuracy": [],
    }


def _read_lines(path: Path) -> Records:
    """The records of a .jsonl file, none where it is missing; a last line that a kill cut off is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict)]
