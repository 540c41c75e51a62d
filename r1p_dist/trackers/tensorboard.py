"""TensorBoard: files in the run's folder, for `tensorboard --logdir runs`."""

from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from r1p_dist.evaluation.score_matrix import ScoreMatrix
from r1p_dist.figures import matrix_figure
from r1p_dist.trackers.tracker import TrackedRun


class TensorBoard:
    """Scalars, the accuracy matrix as a picture, and the settings with what came of them under HPARAMS."""

    def __init__(self, run: TrackedRun) -> None:
        self._settings = run.settings
        # what a killed process wrote after its last checkpoint is hidden
        self._writer = SummaryWriter(str(run.folder), purge_step=run.steps + 1 if run.steps else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def matrix(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._writer.add_figure("accuracy_matrix", matrix_figure(ScoreMatrix.read(dict(metrics))), step)

    def close(self, metrics: Mapping[str, Any] | None) -> None:
        if metrics is not None:
            plain = {
                name: value if isinstance(value, int | float) else str(value) for name, value in self._settings.items()
            }
            found = {f"stream/{name}": metrics[name] for name in ("transfer", "average", "last", "forgetting")}
            known = {name: value for name, value in found.items() if value is not None}
            self._writer.add_hparams(plain, known, run_name=".")
        self._writer.close()
