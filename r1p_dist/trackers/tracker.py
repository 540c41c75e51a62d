"""What a service that shows runs is told."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from r1p_dist.files import write_atomically


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker shows.

    settings: dotted key -> value. steps: optimizer steps of the stream done when this process began, 0 for a new run.
    folder: of the tracker alone, inside the run's; what it keeps there tells it which of its runs this is.
    """

    name: str
    stream: str
    settings: Mapping[str, Any]
    steps: int
    folder: Path

    def identity(self, make: Callable[[], str]) -> str:
        """Returns by what the service knows this run: as when it began, or what `make` gives a new one."""
        path = self.folder / "identity"
        if not self.steps or not path.is_file():
            write_atomically(path, make())
        return path.read_text(encoding="utf-8")


class Tracker(Protocol):
    """Shows one run. Steps are counted over the whole stream, so that one axis serves all tasks.

    Whatever a method raises becomes one warning, and the tracker is not asked again.
    """

    def __init__(self, run: TrackedRun) -> None: ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Is told numbers by name, with `/` between a group and what is in it: `train/loss`, `accuracy/flags`."""

    def matrix(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Is told the content of metrics.json after a stage, for a picture or a file."""

    def close(self, metrics: Mapping[str, Any] | None) -> None:
        """Is told that this process trains no more. metrics: of the finished run, None where it was not finished."""
