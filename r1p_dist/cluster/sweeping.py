"""Submits the points of a sweep that are neither finished nor on their way."""

import time
from collections.abc import Sequence
from pathlib import Path

from r1p_dist.cluster.profile import ClusterProfile
from r1p_dist.cluster.runs import describe_runs
from r1p_dist.cluster.submission import Submission, submit
from r1p_dist.cluster.sweep import Point
from r1p_dist.errors import InputError
from r1p_dist.run_files import JOBS

_LOOK_S = 1.0


def submit_points(
    points: Sequence[Point], folder: Path, profile: ClusterProfile, name: str, parallel: int | None
) -> list[str]:
    """Submits what has to be trained yet and returns the points' names.

    SLURM gets one array job and lets `parallel` of its points run at a time. On this machine (local) nobody would hold
    the others back, so this waits, one point at a time unless `parallel` says otherwise.
    """
    if profile.cluster == "debug":
        raise InputError("cluster=debug runs one run in this process; a sweep needs slurm or local")
    states = describe_runs([point.config.run_dir for point in points])
    due = [point for point, state in zip(points, states, strict=True) if not (state.is_finished or state.is_active)]
    submissions = [Submission(point.config, folder) for point in due]
    if profile.cluster == "slurm":
        if submissions:
            submit(submissions, profile, folder / JOBS, name, parallel)
    else:
        for number, submission in enumerate(submissions):
            before = [earlier.run_dir for earlier in submissions[:number]]
            while sum(state.is_active for state in describe_runs(before)) >= (parallel or 1):
                time.sleep(_LOOK_S)
            submit([submission], profile, folder / JOBS, name)
    return [point.name for point in due]
