"""What runs there are and how they stand: their folders' own files, and the cluster's word on their jobs."""

import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1p_dist.cluster.scheduler import JobRecord, JobState, job_states
from r1p_dist.errors import InputError
from r1p_dist.files import read_mapping
from r1p_dist.run_files import CONFIG_FILE, JOB_FILE, LOG_FILE, STATUS_FILE
from r1p_dist.safe_yaml import read_yaml

_ERROR = re.compile(r"^(error\b|\w+: error: |[\w.]*(Error|Exception)\b)")
_TAIL = 65536  # bytes of a log to look for an error in
_FOLLOW_S = 1.0
_LOOK_S = 2.0
# A run's own words for what it is doing; any other state is one that it is not doing anything in.
_AT_WORK = ("starting", "training", "merging", "evaluating", "saving")


@dataclass(frozen=True)
class RunState:
    """How a run stands; `state` is the run's own word, the cluster's while it waits or when it ended too early."""

    run_dir: Path
    state: str
    method: str | None = None
    task: str | None = None
    step: int | None = None
    samples_per_second: float | None = None
    seconds_left: float | None = None
    job: JobRecord | None = None
    job_time_left: str | None = None
    error: str | None = None

    @property
    def is_active(self) -> bool:
        """Whether its job waits or runs."""
        return self.job_time_left is not None

    @property
    def is_finished(self) -> bool:
        return self.state == "finished"


def find_runs(roots: Iterable[Path]) -> list[Path]:
    """Returns the folders below the roots that hold a run, or a job for one. InputError: a root does not exist."""
    found = set()
    for root in roots:
        if not root.is_dir():
            raise InputError(f"{root}: no such folder")
        for pattern in (STATUS_FILE, JOB_FILE):
            found.update(path.parent for path in [*root.glob(pattern), *root.glob(f"*/{pattern}")])
            found.update(path.parent for path in root.glob(f"*/*/{pattern}"))
    return sorted(found)


def describe_runs(run_dirs: Iterable[Path]) -> list[RunState]:
    """Returns how each run stands; asks the cluster once for all."""
    records = {run_dir: JobRecord.read(run_dir) for run_dir in run_dirs}
    states = job_states(record for record in records.values() if record is not None)
    return [_describe(run_dir, record, states.get(record)) for run_dir, record in records.items()]


def wait_for(run_dirs: Sequence[Path]) -> list[RunState]:
    """Waits until no run has a job that waits or runs, and returns how they stand then."""
    while True:
        states = describe_runs(run_dirs)
        if not any(state.is_active for state in states):
            return states
        time.sleep(_LOOK_S)


def describe_without_cluster(run_dir: Path) -> RunState:
    """Returns how a run stands by its own files alone."""
    return _describe(run_dir, None, None)


def _describe(run_dir: Path, record: JobRecord | None, job: JobState | None) -> RunState:
    status, config, log = (
        read_mapping(run_dir / STATUS_FILE),
        _read_config(run_dir),
        _last_record(run_dir / LOG_FILE),
    )
    state, error = _state(status, job), None
    if record is not None and state not in ("finished", "pending") and not (job and job.is_active):
        error = last_error(record)
    speed = log.get("samples_per_second")
    steps_left, batch = status.get("steps_left"), config.get("train", {}).get("global_batch_size")
    is_training = state == "training" and speed and steps_left is not None and batch
    return RunState(
        run_dir,
        f"{state} ({job.reason})" if job and job.is_active and job.reason else state,
        config.get("method"),
        status.get("task"),
        status.get("step"),
        speed,
        steps_left * batch / speed if is_training else None,
        record,
        (job.time_left or "unlimited") if job and job.is_active else None,
        error,
    )


def _state(status: dict[str, Any], job: JobState | None) -> str:
    own = status.get("state")
    if own == "finished":
        return own
    if job is None:
        return "died" if own in _AT_WORK and not _is_alive(status) else own or "unknown"
    if job.is_active:
        return own if own in _AT_WORK and job.name == "running" else job.name
    if own == "stopped":
        return own
    return "failed" if job.name in ("ended", "completed") else job.name


def _is_alive(status: dict[str, Any]) -> bool:
    """Whether the process of a run goes on; of another host's nothing is known, so it is believed."""
    if status.get("host") != os.uname().nodename:
        return True
    return Path(f"/proc/{status.get('process')}").exists()


def last_error(record: JobRecord) -> str | None:
    """Returns the last line with an error in the logs of a job, the one of rank 0 where it has one."""
    for path in record.logs():
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()
        if found := [line.strip() for line in lines if _ERROR.match(line)]:
            own = [line for line in found if not line.startswith(("srun:", "slurmstepd:"))]
            return (own or found)[-1]
    return None


def read_log(run_dir: Path, rank: int = 0, follow: bool = False) -> Iterable[str]:
    """Yields what the ranks of a run's job printed, as it comes; with `follow` until the job ends.

    InputError: no job was submitted for the run, or it has printed nothing yet.
    """
    record = JobRecord.read(run_dir)
    if record is None:
        raise InputError(f"{run_dir}: no job was submitted for this run, so there is no log of one")
    path = record.log(rank)
    if not path.exists() and not (follow and job_states([record])[record].is_active):
        raise InputError(f"{path}: no such log; the job is {job_states([record])[record].name}")
    offset = 0
    while True:
        is_active = follow and job_states([record])[record].is_active  # asked before reading: nothing is missed
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read()
            offset += len(content)
            if content:
                yield content.decode(errors="replace")
        if not is_active:
            return
        time.sleep(_FOLLOW_S)


def _read_config(run_dir: Path) -> dict[str, Any]:
    for name in (CONFIG_FILE, "submitted.yaml"):
        if (run_dir / name).is_file():
            content = read_yaml(run_dir / name)
            return content if isinstance(content, dict) else {}
    return {}


def _last_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        try:
            return json.loads(line)
        except ValueError:
            continue  # a kill cut it off
    return {}
