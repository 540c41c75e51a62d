"""A sweep that chooses its next point by what came of those before."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from r1p_dist.cluster.profile import ClusterProfile
from r1p_dist.cluster.runs import RunState, describe_runs
from r1p_dist.cluster.sampling import Outcome, draw, falls_behind
from r1p_dist.cluster.scheduler import cancel
from r1p_dist.cluster.submission import Submission, submit
from r1p_dist.cluster.sweep import Point, Sweep, make_point
from r1p_dist.cluster.sweep_table import note_pruned, noted_points, pruned_points, write_sweep_file
from r1p_dist.errors import InputError
from r1p_dist.evaluation.score_matrix import means_of
from r1p_dist.files import read_mapping
from r1p_dist.run_files import JOBS, METRICS_FILE

_LOOK_S = 1.0
_LOOK_AT_SLURM_S = 15.0  # its controller serves others too


@dataclass
class Search:
    """Trains `sweep.samples` points, `parallel` at a time, and waits for all of them.

    The folder is all that it knows: points that are there count, and where this process ended, another goes on. prunes:
    a point that falls behind the others is told to end.
    """

    sweep: Sweep
    folder: Path
    profile: ClusterProfile
    name: str
    sampler: str
    parallel: int = 1
    prunes: bool = False
    points: dict[str, Point] = field(default_factory=dict)

    def run(self) -> list[Point]:
        """Returns the points, once nothing of them runs any more. InputError: nothing is to be drawn, or no cluster."""
        self._check()
        for values in noted_points(self.folder).values():
            self._add(values)
        due = deque(self._due())
        while True:
            states = self._states()
            pruned = self._pruned()
            outcomes = [
                self._outcome(point, states.get(name), point in due, name in pruned)
                for name, point in self.points.items()
            ]
            if self.prunes:
                self._prune(states, outcomes)
            active = sum(state.is_active for state in states.values())
            started = list(islice(self._next(due, outcomes), max(0, self.parallel - active)))
            for point in started:
                submit([Submission(point.config, self.folder)], self.profile, self.folder / JOBS, self.name)
            if not active and not started:
                return list(self.points.values())
            time.sleep(_LOOK_AT_SLURM_S if self.profile.cluster == "slurm" else _LOOK_S)

    def _check(self) -> None:
        if self.profile.cluster == "debug":
            raise InputError("cluster=debug runs one run in this process; a sweep needs slurm or local")
        if self.sweep.samples is None:
            raise InputError("a sampler draws points, so say how many: --samples N")
        self.sweep.points()  # says what is wrong with the parameters

    def _add(self, values: Mapping[str, str]) -> Point:
        point = make_point(self.sweep, dict(values), self.folder, self.profile.world_size)
        self.points[point.name] = point
        refused = {point.name: point.refused} if point.refused is not None else {}
        splits = {point.name: point.config.data.evaluate_on} if point.config is not None else {}
        write_sweep_file(self.folder, {point.name: point.values}, refused, splits)
        return point

    def _states(self) -> dict[str, RunState]:
        names = [name for name, point in self.points.items() if point.config is not None]
        return dict(zip(names, describe_runs([self.folder / name for name in names]), strict=True))

    def _pruned(self) -> dict[str, int]:
        return pruned_points(self.folder) if self.points else {}

    def _due(self) -> Iterator[Point]:
        """Yields what an earlier call left undone: points that failed, or that nobody submitted."""
        pruned = self._pruned()
        for name, state in self._states().items():
            if not (state.is_finished or state.is_active or name in pruned):
                yield self.points[name]

    def _next(self, due: deque[Point], outcomes: list[Outcome]) -> Iterator[Point]:
        """Yields points to submit: those that are due, then new ones, as long as there may be more."""
        while due:
            yield due.popleft()
        while len(self.points) < self.sweep.samples:
            if (values := draw(self.sweep, outcomes, self.sampler)) is None:
                return
            point = self._add(values)
            outcomes.append(Outcome(values, "running" if point.config is not None else "fail"))
            if point.config is not None:
                yield point

    def _outcome(self, point: Point, state: RunState | None, is_due: bool, is_pruned: bool) -> Outcome:
        curve = means_of(read_mapping(self.folder / point.name / METRICS_FILE))[1:]  # the first is of no training
        if state is None:
            return Outcome(point.values, "fail")
        if state.is_finished:
            return Outcome(point.values, "complete", curve)
        if curve and is_pruned:
            return Outcome(point.values, "pruned", curve)
        return Outcome(point.values, "running" if state.is_active or is_due else "fail", curve)

    def _prune(self, states: Mapping[str, RunState], outcomes: Sequence[Outcome]) -> None:
        for place, (name, outcome) in enumerate(zip(self.points, outcomes, strict=True)):
            if outcome.state == "running" and outcome.curve and falls_behind(self.sweep, outcomes, place):
                note_pruned(self.folder, name, len(outcome.curve))
                if (job := states[name].job) is not None:
                    cancel(job)
