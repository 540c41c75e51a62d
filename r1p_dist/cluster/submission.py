"""Hands runs to a cluster through submitit: one job, or one array job for many."""

import io
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env
from submitit.slurm.slurm import SlurmExecutor

from r1p_dist.cluster.job import EXIT_REQUEUED, TrainJob
from r1p_dist.cluster.profile import ClusterProfile
from r1p_dist.cluster.scheduler import JobRecord, job_states
from r1p_dist.config import RunConfig
from r1p_dist.doctor import ALLOCATOR_VALUE, ALLOCATOR_VARIABLES
from r1p_dist.errors import EXIT_INTERRUPTED, InputError, one_line
from r1p_dist.files import lock_file, write_atomically

SUBMITTED_CONFIG = "submitted.yaml"
_LOCK = ".submission"  # two submissions of one run come one after the other, so that the second sees the first's job
# Ranks notice a lost one by themselves; one that cannot is ended so long after the first that ended.
_LAST_RANKS_S = 120


@dataclass(frozen=True)
class Submission:
    """One run to be submitted. sweep: the folder of the sweep that it is a point of."""

    config: RunConfig
    sweep: Path | None = None

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir


def submit(
    submissions: Sequence[Submission],
    profile: ClusterProfile,
    jobs_folder: Path,
    name: str,
    parallel: int | None = None,
) -> list[submitit.Job]:
    """Submits the runs, several as one array job of which `parallel` run at a time, and notes the job in each folder.

    jobs_folder: for submitit's files and the logs; on a cluster it must be seen from all nodes, and nobody else should
    be able to write in it, since a job runs what lies there. InputError: a run has a job that waits or runs, or SLURM
    refuses, with its message.
    """
    with ExitStack() as locks:
        for submission in submissions:
            locks.enter_context(lock_file(submission.run_dir / _LOCK))
        _refuse_second_jobs(submissions)
        for submission in submissions:
            write_atomically(submission.run_dir / SUBMITTED_CONFIG, submission.config.dump())
        try:
            executor = _executor(profile, jobs_folder, name, parallel)
            # submitit prints what sbatch says, and then raises it
            with _outside_of_jobs(), redirect_stderr(io.StringIO()), _one_array_job(executor, len(submissions)):
                jobs = [executor.submit(_job(submission)) for submission in submissions]
        except (FailedJobError, FailedSubmissionError, RuntimeError) as error:
            raise InputError(one_line(error)) from error
        for submission, job in zip(submissions, jobs, strict=True):
            JobRecord(profile.cluster, job.job_id, str(jobs_folder.absolute())).write(submission.run_dir)
    return jobs


def dry_run(count: int, profile: ClusterProfile, jobs_folder: Path, name: str, parallel: int | None = None) -> str:
    """Returns the script that `submit` would hand to sbatch for so many runs; needs no SLURM."""
    executor = _PrintingExecutor(jobs_folder)
    parameters = _slurm_parameters(profile, jobs_folder, name, parallel)
    executor.update_parameters(**parameters)
    if count > 1:
        executor.parameters["map_count"] = count
    if profile.python is not None:
        executor.python = profile.python
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


class _PrintingExecutor(SlurmExecutor):
    """Only writes the script, so it needs no srun."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def _job(submission: Submission) -> TrainJob:
    return TrainJob(submission.run_dir / SUBMITTED_CONFIG, submission.sweep)


def _executor(profile: ClusterProfile, folder: Path, name: str, parallel: int | None) -> submitit.AutoExecutor:
    for variable, value in _environment(profile).items():
        os.environ.setdefault(variable, value)
    options = {"slurm_max_num_timeout": profile.timeouts, "slurm_python": profile.python}
    executor = submitit.AutoExecutor(folder, cluster=profile.cluster, **options)
    if profile.cluster == "slurm":
        executor.update_parameters(
            **{f"slurm_{key}": value for key, value in _slurm_parameters(profile, folder, name, parallel).items()}
        )
    else:
        executor.update_parameters(
            timeout_min=profile.minutes,
            tasks_per_node=profile.ranks_per_node,
            gpus_per_node=profile.gpus_per_node,
            stderr_to_stdout=True,
            **({"local_setup": profile.setup} if profile.setup else {}),
        )
    return executor


def _environment(profile: ClusterProfile) -> dict[str, str]:
    """What ranks on CPU should find in their environment before they start; SLURM hands ours on to them."""
    if profile.gpus_per_node:
        return {}
    threads = {"OMP_NUM_THREADS": str(profile.cpus_per_task or 1)}
    return threads | {variable: str(ALLOCATOR_VALUE) for variable in ALLOCATOR_VARIABLES}


def _slurm_parameters(profile: ClusterProfile, folder: Path, name: str, parallel: int | None) -> dict[str, Any]:
    processors = [f"--cpus-per-task={profile.cpus_per_task}"] if profile.cpus_per_task else []
    parameters = {
        "job_name": name,
        "partition": profile.partition,
        "account": profile.account,
        "time": profile.minutes,
        "nodes": profile.nodes,
        "ntasks_per_node": profile.ranks_per_node,
        "gpus_per_node": profile.gpus_per_node or None,
        "cpus_per_task": profile.cpus_per_task,
        "signal_delay_s": profile.signal_delay_s,
        "array_parallelism": parallel,
        "setup": profile.setup or None,
        "teardown": _start_again_after_a_crash(profile.retries, folder),
        # srun does not take this one over from sbatch
        "srun_args": [f"--wait={_LAST_RANKS_S}", *processors, *profile.srun_args],
        "stderr_to_stdout": True,
    }
    known = SlurmExecutor._valid_parameters()
    further = {key.replace("-", "_"): value for key, value in profile.slurm.items()}
    parameters |= {key: value for key, value in further.items() if key in known}
    parameters["additional_parameters"] = {
        key.replace("_", "-"): value for key, value in further.items() if key not in known
    }
    return {key: value for key, value in parameters.items() if value not in (None, {})}


def _start_again_after_a_crash(retries: int, folder: Path) -> list[str]:
    """Shell lines behind srun. A crashed rank 0 cannot queue the job again, so its script does.

    Not for wrong input (2), a run that was told to end, or one that rank 0 has queued again already.
    """
    return [
        "code=$?",
        "job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        f"crashes={shlex.quote(str(folder.absolute()))}/${{job}}_crashes",
        f"case $code in 0|2|{EXIT_INTERRUPTED}|{EXIT_REQUEUED}) ;; *)",
        '  echo "$(date -Is) exit code $code" >> "$crashes"',
        f'  if [ "$(wc -l < "$crashes")" -le {retries} ]; then',
        '    echo "the ranks ended with code $code; the job starts again"',
        "    scontrol requeue $job",
        "  fi ;;",
        "esac",
        "exit $code",
    ]


def _one_array_job(executor: submitit.AutoExecutor, count: int) -> AbstractContextManager:
    return executor.batch() if count > 1 else nullcontext()


def _refuse_second_jobs(submissions: Sequence[Submission]) -> None:
    records = {submission.run_dir: JobRecord.read(submission.run_dir) for submission in submissions}
    states = job_states(record for record in records.values() if record is not None)
    for run_dir, record in records.items():
        if record is not None and states[record].is_active:
            raise InputError(
                f"run_dir={run_dir}: job {record.job_id} is {states[record].name} for this run; wait for it, "
                "cancel it, or name another run_dir"
            )


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hides the job that this process itself runs in, if any: a job submitted from it would take it for its own."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    configuration = os.environ.get("SLURM_CONF")
    with clean_env():
        if configuration is not None:
            os.environ["SLURM_CONF"] = configuration
        yield
