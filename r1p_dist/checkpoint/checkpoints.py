"""The checkpoints of a run: saved in the background, found again, and put back.

    RUN/checkpoints/<task index>-<task>/step-<n>/
        training.safetensors   value, exp_avg and exp_avg_sq of every trainable parameter, fp32, full tensors
        method.safetensors     what the method counts: votes, active experts and so on
        ranks.safetensors      each rank's random states and running sums
        merged-<i>.safetensors the updates of task i, linked from RUN/adapters; memory-<i>: what the method keeps of it
        start.safetensors      of a task in progress, the values that it began with, linked from the checkpoint before
        state.json             where the run stands: task, step, data cursor, accuracy matrix, backbone, versions
        config.yaml            the resolved configuration
        manifest.json          size and SHA-256 of each file; written last

Nothing depends on the number of ranks or the ZeRO stage. The last step of a task is saved after its evaluation.
"""

import json
import logging
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from r1p_dist.checkpoint.folders import fault_of, read_json, read_tensors, tensor_file, write_folder
from r1p_dist.checkpoint.training_state import Capture
from r1p_dist.config import RunConfig
from r1p_dist.distributed import agree, rank
from r1p_dist.errors import InputError
from r1p_dist.recipes import load_config
from r1p_dist.run_files import CHECKPOINTS, CONFIG_FILE, METHOD_FILE
from r1p_dist.safe_yaml import inline_yaml

FORMAT = 2
_Whole = Annotated[int, Field(ge=0)]
# What may change between two starts of a run: where and how fast it runs, not what it computes.
FREE_KEYS = (
    "run_dir resume checkpoint faults log deepspeed data.workers data.cache_dir data.cache_gb evaluation.batch_size "
    "backbone.gradient_checkpointing backbone.feature_cache_dir backbone.feature_cache_dir_gb train.compile"
).split()
_logger = logging.getLogger(__name__)


class State(BaseModel):
    """What state.json must have; the rest is checked by those who read it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal[2]
    task: str
    stage: _Whole
    step: _Whole
    world_size: _Whole
    log_bytes: dict[str, _Whole]
    progress: dict[str, Any]
    facts: dict[str, Any]
    cursor: dict[str, Any] | None = None
    adam_steps: _Whole | None = None
    terms: list[str] = []

    @model_validator(mode="after")
    def _check_step(self) -> "State":
        if self.step and (self.cursor is None or self.adam_steps is None):
            raise ValueError("a task in progress needs cursor and adam_steps")
        return self


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; `state` is its state.json."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done in task `stage`; 0 between two tasks."""
        return self.state["step"]

    @property
    def stage(self) -> int:
        """Index of the task that comes next or goes on."""
        return self.state["stage"]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Returns the content of NAME.safetensors. InputError: it is no such file."""
        return read_tensors(self.folder / f"{name}.safetensors")


class Checkpoints:
    """Writes and finds the checkpoints of one run; every method but `wait` is to be called by all ranks.

    On rank 0 a thread writes while the training goes on. Where a save fails, as on a full disk, the log says why and
    the one before stays; the training goes on.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.root = config.run_dir / CHECKPOINTS
        self._thread: threading.Thread | None = None
        self._is_written = True  # the last one

    def find(self) -> Checkpoint | None:
        """Returns the checkpoint to resume from, or None to begin.

        InputError: `resume` names a folder that is no whole checkpoint, or the run had another configuration.
        """
        found = agree(self._find)
        if found is None:
            return None
        return Checkpoint(Path(found), read_json(Path(found) / "state.json"))

    def _find(self) -> str | None:
        resume = self.config.resume
        if resume == "never":
            shutil.rmtree(self.root, ignore_errors=True)
            return None
        if resume != "auto":
            if fault := fault_of(Path(resume)):
                raise InputError(f"resume={resume}: not a whole checkpoint: {fault}")
            candidates = [Path(resume)]
        else:
            candidates = checkpoint_folders(self.root)
        for folder in candidates:
            if fault := fault_of(folder):
                _logger.warning("checkpoint %s is skipped: %s", folder, fault)
                continue
            self._check(folder)
            return str(folder)
        if candidates:
            raise InputError(f"{self.root}: none of {len(candidates)} checkpoints is whole; resume=never starts over")
        return None

    def _check(self, folder: Path) -> None:
        state = read_json(folder / "state.json")
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise InputError(f"{folder}: written by another release, in another format than {FORMAT}; resume=never")
        try:
            State.model_validate(state)
        except ValidationError as error:
            fault = error.errors()[0]
            raise InputError(f"{folder}/state.json: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error
        before = load_config(folder / CONFIG_FILE)
        if differences := config_differences(before, self.config):
            raise InputError(
                f"run_dir={self.config.run_dir}: its run has another configuration: {'; '.join(differences)}; give "
                "another run_dir, or start over with resume=never"
            )

    def save(
        self,
        name: str,
        state: dict[str, Any],
        method: dict[str, torch.Tensor],
        capture: Capture,
        links: Mapping[str, Path],
    ) -> None:
        """Starts to save as NAME (task/step-n) what is handed over; waits for the save before, if it still goes on.

        links: files of finished tasks, by the name that they get.
        """
        self.wait()
        if rank() == 0:
            method = {key: tensor.detach().cpu().clone() for key, tensor in method.items()}
            arguments = (self.root / name, state, method, capture, dict(links))
            self._thread = threading.Thread(target=self._write, args=arguments)
            self._thread.start()

    def wait(self) -> bool:
        """Waits until what was handed over is on the disk, and returns whether it came there; rank 0 knows."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._is_written

    def _write(
        self,
        folder: Path,
        state: dict[str, Any],
        method: dict[str, torch.Tensor],
        capture: Capture,
        links: dict[str, Path],
    ) -> None:
        self._is_written = False
        try:
            files = {
                "training.safetensors": tensor_file(capture.tensors()),
                METHOD_FILE: tensor_file(method),
                "ranks.safetensors": tensor_file({"ranks": capture.locals()}),
                "state.json": json.dumps({"format": FORMAT, **state}).encode(),
                CONFIG_FILE: self.config.dump().encode(),
            }
            # what a stage began with is in the checkpoint before it, whose save may have failed
            links = {name: file for name, file in links.items() if name != "start.safetensors" or file.is_file()}
            write_folder(folder, files, links)
            self._is_written = True
            self._prune()
        except OSError as error:
            _logger.error(
                "checkpoint %s could not be written: %s; the training goes on, and the checkpoint before it stays",
                folder,
                error,
            )

    def _prune(self) -> None:
        # one per finished task stays, and the newest few of the task that is being trained
        running: list[Path] = []
        for folder in checkpoint_folders(self.root):
            with suppress(InputError, KeyError):  # a broken one is not counted
                if read_json(folder / "state.json")["step"]:
                    running.append(folder)
        for folder in running[self.config.checkpoint.keep :]:
            shutil.rmtree(folder)


def checkpoint_folders(root: Path) -> list[Path]:
    """Returns the checkpoints of a run, whole or not, newest first."""
    return sorted(root.glob("[0-9]*/step-*"), key=lambda path: (path.parent.name, _number(path)), reverse=True)


def _number(path: Path) -> int:
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def config_differences(before: RunConfig, now: RunConfig) -> list[str]:
    """Returns what differs between two configurations, one readable item per key.

    `FREE_KEYS` are left out, and `extend` where it only got longer.
    """
    if now.extend[: len(before.extend)] == before.extend:
        before = before.model_copy(update={"extend": now.extend})
    old, new = before.flat(), now.flat()
    return [
        f"{key}: {inline_yaml(old.get(key))} there, {inline_yaml(new.get(key))} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    ]
