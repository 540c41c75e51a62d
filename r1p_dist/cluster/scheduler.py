"""What state jobs are in, and how they end: squeue, sacct, scancel, or processes of this machine."""

import json
import os
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from submitit.core.utils import JobPaths

from r1p_dist.errors import InputError, one_line
from r1p_dist.files import write_atomically
from r1p_dist.run_files import JOB_FILE

_TIMEOUT_S = 60


@dataclass(frozen=True)
class JobRecord:
    """The job that was last submitted for a run; stands in RUN/job.json. folder: submitit's files."""

    cluster: str
    job_id: str
    folder: str

    @classmethod
    def read(cls, run_dir: Path) -> "JobRecord | None":
        """Returns the record of a run, None where none was submitted. InputError: the file is not such a record."""
        try:
            content = (run_dir / JOB_FILE).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return cls(**{str(key): str(value) for key, value in json.loads(content).items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{run_dir / JOB_FILE}: not the record of a job: {one_line(error)}; remove it") from error

    def write(self, run_dir: Path) -> None:
        write_atomically(run_dir / JOB_FILE, json.dumps(asdict(self)) + "\n")

    def log(self, rank: int = 0) -> Path:
        """The file with what a rank printed, over all starts of the job."""
        return JobPaths(self.folder, self.job_id, rank).stdout

    def logs(self) -> list[Path]:
        """The files with what the ranks printed, by rank, as far as there are some."""
        paths = Path(self.folder).glob(f"{self.job_id}_*_log.out")
        return sorted(paths, key=lambda path: int(path.name.split("_")[-2]))


@dataclass(frozen=True)
class JobState:
    """SLURM's word for the state, in small letters; time_left until the job's limit, and why it waits."""

    name: str
    is_active: bool
    time_left: str | None = None
    reason: str | None = None


_GONE = JobState("ended", False)


def job_states(records: Iterable[JobRecord]) -> dict[JobRecord, JobState]:
    """Returns the state of each job. InputError: SLURM does not answer."""
    records = list(records)
    slurm = {record.job_id for record in records if record.cluster == "slurm"}
    known = _slurm_states(slurm) if slurm else {}
    return {
        record: known.get(record.job_id, _GONE) if record.cluster == "slurm" else _local_state(record)
        for record in records
    }


def cancel(record: JobRecord) -> None:
    """Asks the job to end; a run that trains saves first. InputError: SLURM refuses."""
    if record.cluster == "slurm":
        _ask("scancel", record.job_id)
    elif _local_state(record).is_active:
        os.kill(int(record.job_id), signal.SIGTERM)


def _slurm_states(job_ids: set[str]) -> dict[str, JobState]:
    states = {}
    for line in _ask("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%L|%r").splitlines():
        job_id, name, left, reason = line.split("|", 3)
        states[job_id] = JobState(name.lower(), True, left, None if reason == "None" else reason)
    gone = job_ids - states.keys()
    if gone:
        try:
            # Not every cluster keeps accounts; what it says of ended jobs is then missed.
            fields = ["--noheader", "--parsable2", "--allocations", "--format=JobID,State"]
            ended = _ask("sacct", *fields, "--jobs", ",".join(sorted(gone)))
        except InputError:
            ended = ""
        for line in ended.splitlines():
            job_id, name = line.split("|", 1)
            states.setdefault(job_id, JobState(name.split()[0].lower(), False))
    return states


def _ask(*command: str) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except FileNotFoundError as error:
        raise InputError(f"{command[0]}: not found, so there is no SLURM here; use --cluster local") from error
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{command[0]}: no answer within {_TIMEOUT_S} s; is the controller up?") from error
    except subprocess.CalledProcessError as error:
        raise InputError(f"{command[0]}: {one_line(error.stderr)}") from error
    return answer.stdout


def _local_state(record: JobRecord) -> JobState:
    """submitit's controller on this machine is the job; its command line names the folder."""
    try:
        command = Path(f"/proc/{record.job_id}/cmdline").read_bytes()
    except OSError:
        return _GONE
    return JobState("running", True) if record.folder.encode() in command else _GONE
