"""What outlives the process of a run: its progress, saved in checkpoints and taken up again by the next process."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from r1p_dist.adapters import Dense, Update
from r1p_dist.checkpoint import (
    Capture,
    Checkpoint,
    Checkpoints,
    TensorFile,
    load_updates,
    restore_values,
    save_memory,
    save_updates,
    write_facts,
)
from r1p_dist.config import RunConfig
from r1p_dist.data import TrainLoader
from r1p_dist.data.order import digest_number
from r1p_dist.distributed import agree, rank, world_size
from r1p_dist.engine import TaskEngine
from r1p_dist.errors import InputError
from r1p_dist.interrupts import StepAgreement
from r1p_dist.optimizer_state import adam_steps
from r1p_dist.protocol import Drift, Method, Stage, change_between
from r1p_dist.run_files import METHOD_FILE, stage_folder
from r1p_dist.run_folder import RunFolder
from r1p_dist.runlog import RunLog
from r1p_dist.stage_data import StageData
from r1p_dist.step_meter import StepMeter
from r1p_dist.trackers import TrackedRun, Trackers
from r1p_dist.trainer import TaskTrainer

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
    """A stage in progress."""

    index: int
    stage: Stage
    loader: TrainLoader
    model: TaskEngine
    trainer: TaskTrainer
    meter: StepMeter
    step: int = 0


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
        self.point = self.checkpoints.find() if method.trains else None
        self.progress = Progress()
        self.last_saved: str | None = None
        self._saved_before: str | None = None
        self._updates: dict[int, Mapping[str, Update]] = {}  # of finished stages, those that were asked for
        self.drift: dict[str, float] = {}  # by layer, of the stage that was evaluated last
        self._started = time.perf_counter()
        if self.point is not None:
            self._check_facts(self.point)
            self.progress = Progress(**self.point.state["progress"])
            self.last_saved = str(self.point.folder)
        # cut back to where the checkpoint was taken
        sizes = self.point.state["log_bytes"] if self.point else None
        self.log = RunLog(config.run_dir, config.dump(), self._make_trackers, sizes)

    def close(self) -> None:
        """Waits for the last save and leaves the run folder to others."""
        self.checkpoints.wait()
        self.log.close()
        for folder in self._folder:
            folder.close()

    def _make_trackers(self) -> Trackers:
        config, point = self.config, self.point
        done = sum(stage.iterations for stage in self.stages[: point.stage]) + point.step if point else 0
        run = TrackedRun(config.run_dir.name, config.stream, config.flat(), done, config.run_dir)
        return Trackers(config.log.trackers, run, {stage.name: stage.iterations for stage in self.stages})

    def _check_facts(self, point: Checkpoint) -> None:
        before = point.state["facts"]
        if before["backbone"] != self.facts["backbone"]:
            raise InputError(
                f"{point.folder}: was trained on the backbone {before['backbone']}, this is "
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

    def wait_on_all_ranks(self) -> bool:
        """Waits until the last save is on the disk, and returns whether it came there.

        No rank ends before, or a launcher would end rank 0 with it.
        """
        is_written = agree(self.checkpoints.wait)
        if not is_written:
            self.last_saved = self._saved_before
        return is_written

    def open_stage(
        self,
        index: int,
        data: StageData,
        make_engine: Callable[[], TaskEngine],
        agreement: StepAgreement,
    ) -> Running:
        """Begins a stage, or takes it up where the checkpoint was taken.

        Either way the method sees the same weights and values first.
        """
        stage, point, method = self.stages[index], self.point, self.method
        if point is not None and point.stage != index:
            point = None
        ranks = self._saved_ranks(point)
        self.deploy(method.merged(index))
        if point is not None:
            self._restore_start(point)
        method.prepare(index)
        if point is not None and not point.step:
            self._restore_random_states(point, ranks)
        model = make_engine()
        meter = StepMeter(method.backbone.device, point.state["terms"] if point else ())
        memory = [TensorFile(self._stage_file(past, "memory")) for past in range(index)]
        trainer = TaskTrainer(method, model, agreement, meter, data.scan, memory)
        running = Running(index, stage, data.train, model, trainer, meter)
        method.begin(stage, trainer)
        if point is not None and point.step:
            self._restore_step(running, point, ranks)
        for name, further_loader in data.further.items():
            if point is not None and point.step:
                further_loader.resume(point.state["cursor"]["further"][name])
            trainer.add_stream(name, further_loader)
        return running

    def _saved_ranks(self, point: Checkpoint | None) -> torch.Tensor:
        """Returns what each rank saved of itself: its sums and random states."""
        if point is None:
            return torch.zeros(0, 0)
        ranks = point.tensors("ranks").get("ranks", torch.zeros(0, 0))
        bytes_per_rank = len(self._local(StepMeter(torch.device("cpu"), point.state["terms"])))
        if ranks.dtype != torch.uint8 or ranks.shape != (point.state["world_size"], bytes_per_rank):
            raise InputError(f"{point.folder}/ranks.safetensors: has other random states than this machine's")
        return ranks

    def _restore_start(self, point: Checkpoint) -> None:
        """Puts back the values that the stage begins with."""
        name = "start" if point.step else "training"
        if (point.folder / f"{name}.safetensors").is_file():
            parameters = self.method.trainable_parameters()
            values = {key: value for key, value in point.tensors(name).items() if key.endswith(".value")}
            restore_values(parameters, None, values, f"{point.folder}/{name}.safetensors")
        if not point.step:
            self._restore_method(point)

    def _restore_step(self, running: Running, point: Checkpoint, ranks: torch.Tensor) -> None:
        method, engine = self.method, running.model.engine
        tensors = point.tensors("training")
        restore_values(method.trainable_parameters(), engine, tensors, str(point.folder), method.columns)
        self._restore_method(point)
        running.model.go_on_at(point.step, point.state["adam_steps"])
        running.loader.resume(point.state["cursor"])
        running.step = running.trainer.step_number = point.step
        self._restore_random_states(point, ranks)
        running.meter.restore(ranks[:, : len(running.meter.to_bytes())])

    def _restore_method(self, point: Checkpoint) -> None:
        state = point.tensors("method")
        try:
            self.method.load_state(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"{point.folder}/{METHOD_FILE}: does not fit this run: {error}") from error

    def finish_stage(self, index: int) -> None:
        """Keeps what the method leaves of a stage, on disk too, and makes the weights those of the model after it."""
        updates = self.method.updates()
        try:
            save_updates(self._own_file(index, "adapter"), updates)
            save_memory(self._own_file(index, "memory"), self.method.memory())
        except InputError as error:
            raise InputError(f"{error}; make room, the same command then resumes from {self.last_saved}") from error
        self._updates[index] = updates
        self.deploy(self.method.deployed(index + 1))
        if any(isinstance(update, Dense) for update in updates.values()):
            del self._updates[index]  # large; the file has it

    def deploy(self, stages: Sequence[int]) -> None:
        """Makes the weights those of the pristine model with what these finished stages left."""
        held = self.method.set_merged([self._update(index) for index in stages])
        self._updates.update(zip(stages, held, strict=True))

    def _update(self, index: int) -> Mapping[str, Update]:
        """Returns what a finished stage left."""
        if index not in self._updates:
            file = self._stage_file(index, "adapter")
            self._updates[index] = load_updates(file, self.method.update_places(), self.method.backbone.device)
        return self._updates[index]

    def start_drift(self, index: int) -> Drift:
        """Returns what measures how far stage `index`, the last one that was finished, moved each layer's output.

        It measures none where a stage leaves whole weights, or the model is not the same for all tasks.
        """
        method = self.method
        adapters = method.adapters if method.inference == "merged" else []
        if not adapters:
            return Drift(method.backbone, [], {})
        before, after = method.deployed(index), method.deployed(index + 1)
        gone = [self._update(stage) for stage in before if stage not in after]
        new = [self._update(stage) for stage in after if stage not in before]
        return Drift(method.backbone, adapters, change_between(gone, new))

    def _own_file(self, index: int, name: str) -> Path:
        return stage_folder(self.config.run_dir, index, self.stages[index].name) / f"{name}.safetensors"

    def _stage_file(self, index: int, name: str) -> Path:
        """Returns a file of a finished stage: this run's, or that of the checkpoint which `resume` named."""
        own = self._own_file(index, name)
        if self.point is not None and self.point.stage > index:
            there = self.point.folder / _linked(name, index)
            return there if there.is_file() else own
        return own

    def save_step(self, running: Running) -> None:
        """Saves a stage in progress; the writing goes on in the background."""
        running.loader.check_faults()
        state = {
            "stage": running.index,
            "step": running.step,
            "cursor": running.loader.cursor(running.step) | {"further": running.trainer.cursors()},
            "adam_steps": adam_steps(running.model.engine),
        }
        self._save(running.index, running.step, state, running.model.engine, running.meter)

    def save_task(self, index: int) -> None:
        """Saves the end of a stage, after its merge and evaluation: its folder is complete then, and a checkpoint."""
        name = self.stages[index].name
        facts = {"task": name, "method": self.config.method}
        facts |= {"backbone": self.config.backbone.name, "seed": self.config.seed}
        updates = self._updates.get(index) or self.method.updates()
        agree(lambda: write_facts(self._own_file(index, "adapter").parent, updates, facts, self.drift))
        state = {"stage": index + 1, "step": 0}
        self._save(index, self.stages[index].iterations, state, None, StepMeter(torch.device("cpu")))

    def _local(self, meter: StepMeter) -> torch.Tensor:
        return torch.cat([meter.to_bytes(), *_random_states()])

    def _save(self, index: int, step: int, state: dict[str, Any], engine: Any | None, meter: StepMeter) -> None:
        progress = asdict(self.progress) | {"seconds": round(self.seconds, 1)}
        state |= {
            "task": self.stages[index].name,
            "progress": progress,
            "log_bytes": self.log.sizes(),
            "world_size": world_size(),
            "facts": self.facts,
            "terms": meter.names,
        }
        name = f"{index:02d}-{self.stages[index].name}/step-{step}"
        capture = Capture(self.method.trainable_parameters(), engine, self._local(meter), self.method.columns)
        if self.checkpoints.wait():
            self._saved_before = self.last_saved
        self.checkpoints.save(name, state, self.method.state(), capture, self._links(state["stage"], state["step"]))
        self.last_saved = str(self.checkpoints.root / name)

    def _links(self, count: int, step: int) -> dict[str, Path]:
        """Returns the files of finished stages that a checkpoint needs, by the names that they get in it."""
        links = {}
        for index in range(count):
            links |= {_linked(name, index): self._stage_file(index, name) for name in ("adapter", "memory")}
        if step and (start := self._start_file(count)) is not None:
            links["start.safetensors"] = start
        return links

    def _start_file(self, index: int) -> Path | None:
        """Returns the file of the values that a stage began with; None for the first one."""
        if self.point is not None and self.point.stage == index:
            there = self.point.folder / f"{'start' if self.point.step else 'training'}.safetensors"
            return there if there.is_file() else None
        if index == 0:
            return None
        before = self.stages[index - 1]
        folder = self.checkpoints.root / f"{index - 1:02d}-{before.name}" / f"step-{before.iterations}"
        return folder / "training.safetensors"

    def _restore_random_states(self, point: Checkpoint, ranks: torch.Tensor) -> None:
        """Sets this rank's random states; on another number of ranks they begin anew."""
        if len(ranks) != world_size():
            torch.manual_seed(digest_number("random", self.config.seed, point.stage, point.step, rank()))
            return
        sizes = [len(state) for state in _random_states()]
        states = ranks[rank()][-sum(sizes) :].split(sizes)
        torch.set_rng_state(states[0].clone())
        if len(states) > 1:
            torch.get_device_module().set_rng_state(states[1].clone())


def _linked(name: str, index: int) -> str:
    """Returns the name that a finished stage's file gets in a checkpoint."""
    return f"{'merged' if name == 'adapter' else name}-{index:02d}.safetensors"


def _random_states() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if torch.accelerator.is_available():
        states.append(torch.get_device_module().get_rng_state().cpu())
    return states
