"""What outlives the process of a run: its progress, saved in checkpoints and taken up again by the next process."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from r1p_dist.checkpoint import Capture, Checkpoints, load_adapter, restore_values, save_adapter
from r1p_dist.config import RunConfig
from r1p_dist.data import TrainLoader
from r1p_dist.data.order import digest_number
from r1p_dist.distributed import agree, rank, world_size
from r1p_dist.engine import TaskEngine
from r1p_dist.errors import InputError
from r1p_dist.methods import Method, Stage
from r1p_dist.optimizer_state import adam_steps
from r1p_dist.run_folder import RunFolder
from r1p_dist.runlog import RunLog

_logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a run has found so far, as in metrics.json; seconds: spent by the processes before this one."""

    rows: list[list[float]] = field(default_factory=list)
    following: list[list[float]] = field(default_factory=list)
    before_merge: list[float | None] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Running:
    """A stage in progress. sums: of loss, AGO loss and new faults since the last logged step, and their number."""

    index: int
    stage: Stage
    loader: TrainLoader
    model: TaskEngine
    step: int = 0
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))


class Session:
    """Finds where a run stopped, puts that state back, and saves it as the run goes on."""

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        stages: Sequence[Stage],
        facts: dict[str, Any],
        lock_patience_s: float = 0,
    ) -> None:
        """facts: backbone and versions, kept in every checkpoint. lock_patience_s: as RunFolder's.

        InputError: the folder is in use or cannot be written, or its run had another configuration or backbone.
        """
        self._folder: list[RunFolder] = []
        agree(lambda: self._folder.append(RunFolder(config.run_dir, lock_patience_s)))
        self.config, self.method, self.stages, self.facts = config, method, stages, facts
        self.checkpoints = Checkpoints(config)
        self.point = self.checkpoints.find() if method.adapters else None
        self.progress = Progress()
        self.last_saved: str | None = None
        self._started = time.perf_counter()
        if self.point is not None:
            self._check_facts()
            self.progress = Progress(**self.point.state["progress"])
            self.last_saved = str(self.point.folder)
        # cut back to where the checkpoint was taken
        sizes = self.point.state["log_bytes"] if self.point else None
        self.log = RunLog(config.run_dir, config.dump(), config.log.tensorboard, sizes)

    def close(self) -> None:
        """Waits for the last save and leaves the run folder to others."""
        self.checkpoints.wait()
        for folder in self._folder:
            folder.close()

    def _check_facts(self) -> None:
        before = self.point.state["facts"]
        if before["backbone"] != self.facts["backbone"]:
            raise InputError(
                f"{self.point.folder}: was trained on the backbone {before['backbone']}, this is "
                f"{self.facts['backbone']}; give that one, or another run_dir"
            )
        if before["versions"] != self.facts["versions"]:
            _logger.warning("the run began with %s and goes on with %s", before["versions"], self.facts["versions"])

    @property
    def first_stage(self) -> int:
        return self.point.stage if self.point else 0

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, over all its processes."""
        return self.progress.seconds + time.perf_counter() - self._started

    def steps_left(self, running: Running) -> int:
        """Returns how many optimizer steps the stream still has from here."""
        return sum(stage.iterations for stage in self.stages[running.index :]) - running.step

    def wait_on_all_ranks(self) -> None:
        """Waits until the last save is on the disk; no rank ends before, or a launcher would end rank 0 with it."""
        agree(self.checkpoints.wait)

    def open_stage(self, index: int, loader: TrainLoader, make_engine: Callable[[], TaskEngine]) -> Running:
        """Begins a stage, or takes it up where the checkpoint was taken."""
        stage, point, method = self.stages[index], self.point, self.method
        if point is None or point.stage != index:
            method.begin_task(index)
            return Running(index, stage, loader, make_engine())
        tensors, ranks = point.tensors("training"), point.tensors("ranks").get("ranks", torch.zeros(0, 0))
        bytes_per_rank = 32 + sum(map(len, _random_states()))
        if ranks.dtype != torch.uint8 or ranks.shape != (point.state["world_size"], bytes_per_rank):
            raise InputError(f"{point.folder}/ranks.safetensors: has other random states than this machine's")
        if not point.step:
            restore_values(method.trainable_parameters(), None, tensors, str(point.folder))
            self._restore_method()
            self._restore_random_states(ranks)
        method.begin_task(index)
        # The engine casts and shards the weights; what was merged is computed on its result, as it was then.
        running = Running(index, stage, loader, make_engine(), point.step)
        self.restore_merged(method.merged_tasks(index))
        if point.step:
            engine = running.model.engine
            restore_values(method.trainable_parameters(), engine, tensors, str(point.folder))
            self._restore_method()
            running.model.go_on_at(point.step, point.state["adam_steps"])
            loader.resume(point.state["cursor"])
            running.sums = self._restore_random_states(ranks)
        return running

    def _restore_method(self) -> None:
        state = self.point.tensors("method")
        try:
            self.method.load_state(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"{self.point.folder}/method.safetensors: does not fit this run: {error}") from error

    def restore_merged(self, tasks: Sequence[int]) -> None:
        """Makes the weights those of the pristine model with what these finished tasks merged."""
        files = [self.point.folder / f"merged-{task:02d}.safetensors" for task in tasks]
        self.method.restore_merged([load_adapter(file, self.method.adapters) for file in files])

    def save_step(self, running: Running) -> None:
        """Saves a stage in progress; the writing goes on in the background."""
        running.loader.check_faults()
        state = {
            "stage": running.index,
            "step": running.step,
            "cursor": running.loader.cursor(running.step),
            "adam_steps": adam_steps(running.model.engine),
        }
        self._save(running.index, running.step, state, running.model.engine, running.sums)

    def save_task(self, index: int) -> None:
        """Saves the end of a stage, after its merge and evaluation: its merged experts, and a checkpoint."""
        agree(lambda: self._save_adapter(index))
        state = {"stage": index + 1, "step": 0}
        self._save(index, self.stages[index].iterations, state, None, torch.zeros(4, dtype=torch.float64))

    def _save_adapter(self, index: int) -> None:
        name = self.stages[index].name
        facts = {"method": self.config.method, "backbone": self.config.backbone.name, "seed": self.config.seed}
        folder = self.config.run_dir / "adapters" / f"{index:02d}-{name}"
        try:
            save_adapter(folder, self.method.adapters, {"task": name, **facts})
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be written: {error}; make room, the same command then goes on from {self.last_saved}"
            ) from error

    def _save(self, index: int, step: int, state: dict[str, Any], engine: Any | None, sums: torch.Tensor) -> None:
        random_states = _random_states()
        local = torch.cat([sums.cpu().view(torch.uint8), *random_states])
        progress = asdict(self.progress) | {"seconds": round(self.seconds, 1)}
        state |= {
            "task": self.stages[index].name,
            "progress": progress,
            "log_bytes": self.log.sizes(),
            "world_size": world_size(),
            "facts": self.facts,
        }
        name = f"{index:02d}-{self.stages[index].name}/step-{step}"
        capture = Capture(self.method.trainable_parameters(), engine, local)
        self.checkpoints.save(name, state, self.method.state(), capture, self._merged_files(state["stage"]))
        self.last_saved = str(self.checkpoints.root / name)

    def _merged_files(self, count: int) -> list[Path]:
        """Returns the file of merged experts of each of the first `count` stages."""
        files = []
        for index, stage in enumerate(self.stages[:count]):
            own = self.config.run_dir / "adapters" / f"{index:02d}-{stage.name}" / "adapter.safetensors"
            # `resume` may have named a checkpoint of another run
            is_own = own.is_file() or self.point is None
            files.append(own if is_own else self.point.folder / f"merged-{index:02d}.safetensors")
        return files

    def _restore_random_states(self, ranks: torch.Tensor) -> torch.Tensor:
        """Sets this rank's random states; returns its sums. On another number of ranks both begin anew."""
        sums = ranks[:, :32].contiguous().view(torch.float64)
        if len(ranks) != world_size():
            point = self.point
            torch.manual_seed(digest_number("random", self.config.seed, point.stage, point.step, rank()))
            return sums.sum(0) if rank() == 0 else torch.zeros(4, dtype=torch.float64)
        states = ranks[rank(), 32:].split([len(state) for state in _random_states()])
        torch.set_rng_state(states[0].clone())
        if len(states) > 1:
            torch.get_device_module().set_rng_state(states[1].clone())
        return sums[rank()].clone()


def _random_states() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if torch.accelerator.is_available():
        states.append(torch.get_device_module().get_rng_state().cpu())
    return states
