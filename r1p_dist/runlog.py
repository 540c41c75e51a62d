"""What a run shows and writes while it goes: progress bar, log.jsonl, metrics.json and more; rank 0 only."""

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from r1p_dist.distributed import rank
from r1p_dist.evaluation.results import TaskResult
from r1p_dist.files import replace_file, write_atomically
from r1p_dist.output import terminal
from r1p_dist.run_files import ANSWERS_FILE, CONFIG_FILE, CORRECT_FILE, LOG_FILE, METRICS_FILE, STATUS_FILE
from r1p_dist.trackers import Trackers


class RunLog:
    """The run folder's log files and the terminal; on ranks other than 0 every call does nothing."""

    FILES = (LOG_FILE, CORRECT_FILE, ANSWERS_FILE)

    def __init__(
        self,
        run_dir: Path,
        config_text: str,
        make_trackers: Callable[[], Trackers] | None = None,
        sizes: dict[str, int] | None = None,
    ) -> None:
        """sizes: how many bytes of each of FILES to keep, of a run that goes on; None begins new ones."""
        self.run_dir = run_dir
        self.is_silent = rank() != 0
        self._steps_left: int | None = None
        self._progress: Progress | None = None
        self._pace: tuple[float, int] | None = (
            None  # when the first step of this process ended, and the steps left then
        )
        if self.is_silent:
            return
        write_atomically(run_dir / CONFIG_FILE, config_text)
        for name in self.FILES:
            if (run_dir / name).is_file():
                with (run_dir / name).open("ab") as file:
                    file.truncate(min((sizes or {}).get(name, 0), file.tell()))
        self._console = Console(file=terminal())
        self._trackers = make_trackers() if make_trackers else None

    def status(
        self, state: str, task: str | None = None, step: int | None = None, steps_left: int | None = None
    ) -> None:
        """Says in status.json what the run is doing: starting, training, merging, evaluating, saving, finished,
        stopped or failed.

        steps_left: of the whole stream; where None is given, as many as before.
        """
        if not self.is_silent:
            self._steps_left = self._steps_left if steps_left is None else steps_left
            content = {"state": state, "task": task, "step": step, "steps_left": self._steps_left}
            content |= {"process": os.getpid(), "host": os.uname().nodename}
            replace_file(self.run_dir / STATUS_FILE, json.dumps(content) + "\n")

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each of FILES that is there by now; on rank 0."""
        if self.is_silent:
            return {}
        paths = {name: self.run_dir / name for name in self.FILES}
        return {name: path.stat().st_size for name, path in paths.items() if path.is_file()}

    def say(self, message: str) -> None:
        if not self.is_silent:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Begins a part of the run, such as a task's steps or the batches of an evaluation; ends the one before."""
        if self.is_silent:
            return
        self.end()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
        )
        self._progress = Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        )
        self._bar = self._progress.add_task(what, total=total, completed=done, facts="", left=self._time_left())
        self._progress.start()

    def advance(self, steps_left: int | None = None) -> None:
        """Notes that a step or a batch is done. steps_left: optimizer steps that the whole stream still has."""
        if self.is_silent:
            return
        if steps_left is not None:
            self._steps_left = steps_left
            if self._pace is None:
                self._pace = time.perf_counter(), steps_left
        if self._progress is not None:
            self._progress.update(self._bar, advance=1, left=self._time_left())

    def end(self) -> None:
        """Ends the part of the run that was begun."""
        if not self.is_silent and self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _time_left(self) -> str:
        """Returns the time that the stream will take by the pace up to now, evaluations and merges included."""
        if self._pace is None or self._steps_left is None or self._steps_left == self._pace[1]:
            return ""
        since, steps_left = self._pace
        seconds = (time.perf_counter() - since) / (steps_left - self._steps_left) * self._steps_left
        return f"{timedelta(seconds=round(seconds))} left of the stream"

    def step(self, task: str, step: int, values: dict[str, float]) -> None:
        """Writes one line for `step` (counted from 1 within the task)."""
        if self.is_silent:
            return
        self._append(LOG_FILE, {"task": task, "step": step, **values})
        terms = "".join(f" {k.removeprefix('loss_')} {v:.4f}" for k, v in values.items() if k.startswith("loss_"))
        facts = f"loss {values['loss']:.3f}{terms} {values['samples_per_second']:.0f} samples/s"
        if self._progress is not None:
            self._progress.update(self._bar, facts=facts)
        if not self._console.is_terminal:
            left = self._time_left()
            self.say(f"{task} step {step}: {facts}{', ' if left else ''}{left}")
        if self._trackers:
            self._trackers.step(task, step, values)

    def result(self, row: int, result: TaskResult) -> None:
        """Keeps each sample's score for paired comparisons (1 is right; bits where there is nothing between), each
        answer, and the most frequent confusions."""
        if self.is_silent:
            return
        shares = (result.scores / 100).tolist()
        correct = "".join(str(int(share)) for share in shares) if {*shares} <= {0, 1} else shares
        confusions = {"confusions": result.confusions} if result.confusions else {}
        self._append(CORRECT_FILE, {"row": row, "task": result.task, "correct": correct, **confusions})
        if result.answers:
            self._append(ANSWERS_FILE, {"row": row, "task": result.task, "answers": result.answers})

    def metrics(self, metrics: dict) -> None:
        if not self.is_silent:
            write_atomically(self.run_dir / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")
            if self._trackers:
                self._trackers.metrics(metrics)

    def close(self) -> None:
        """Ends what shows the run elsewhere."""
        if not self.is_silent and self._trackers:
            self._trackers.close()

    def _append(self, name: str, line: dict) -> None:
        with (self.run_dir / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
