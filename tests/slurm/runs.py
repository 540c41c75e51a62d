"""Submits runs as a user does, waits until they train, and finds their processes."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ["--recipe", "mini_mtil_dac", "tasks=[country_flags, playing_cards]"]
# Dropout makes every step depend on the random states, so that a wrong one shows in the weights.
SETTINGS = [
    "train.global_batch_size=8",
    "train.iterations=60",
    "options.dropout=0.1",
    "checkpoint.every_steps=10",
    "log.every_steps=1",
]
PATIENCE_S = 240


def submit(*words: str, expect: int = 0) -> subprocess.CompletedProcess:
    """Runs launchers/submit.py and checks its exit code."""
    command = [sys.executable, "launchers/submit.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE_S)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=True).stdout.strip()


def wait_until(what: str, is_so: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not is_so():
        assert time.monotonic() < deadline, f"waited {patience_s:g} s until {what}"
        time.sleep(0.05)


class Run:
    """The run of one folder and its job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def job(self) -> str:
        return json.loads((self.folder / "job.json").read_text())["job_id"]

    @property
    def status(self) -> dict:
        try:
            return json.loads((self.folder / "status.json").read_text())
        except FileNotFoundError:
            return {}

    @property
    def steps(self) -> int:
        """How many lines of log.jsonl there are: one per step, over all tasks."""
        path = self.folder / "log.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    @property
    def restarts(self) -> int:
        return int(self.about_job("Restarts"))

    def about_job(self, name: str) -> str:
        return ask("scontrol", "show", "job", self.job).split(f"{name}=")[1].split()[0]

    @property
    def output(self) -> str:
        """What the ranks and the batch script have printed."""
        return "".join(path.read_text() for path in sorted((self.folder / "jobs").glob(f"{self.job}_*_log.out")))

    def wait_for_steps(self, count: int) -> None:
        """Waits until so many more steps are logged than now, by a rank 0 that trains."""
        enough = self.steps + count
        wait_until(
            f"{self.folder} trains step {enough}:\n{self.output}",
            lambda: self.steps >= enough and self.status["state"] == "training",
        )
        assert self.status["state"] == "training"

    def wait_for_restart(self, number: int) -> None:
        wait_until(f"job {self.job} is started for the {number}. time again", lambda: self.restarts == number)

    def wait_for_end(self) -> None:
        wait_until(f"job {self.job} has ended", lambda: not ask("squeue", "--noheader", "--me", "--jobs", self.job))

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank; the nodes of the test cluster share this machine."""
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            if environment.get("SLURM_JOB_ID") == self.job and environment.get("SLURM_PROCID") == str(number):
                if "submitit.core._submit" in process.cmdline():
                    return process
        raise AssertionError(f"no process of rank {number} of job {self.job}")
