"""Sweeps that choose their points by what came before, on a cluster that stands in: its jobs are rows of a table."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from r1p_dist.cli import run_command
from r1p_dist.cluster import search
from r1p_dist.cluster.profile import ClusterProfile
from r1p_dist.cluster.runs import RunState
from r1p_dist.cluster.sampling import Outcome, draw, falls_behind
from r1p_dist.cluster.scheduler import JobRecord
from r1p_dist.cluster.search import Search
from r1p_dist.cluster.sweep import Sweep
from r1p_dist.cluster.sweep_table import best_of, write_best, write_sweep_table
from r1p_dist.recipes import load_config

LR = "train.lr=loguniform(1e-4, 1e-1)"


def sweep_of(*words: str, samples: int = 8, seed: int = 0) -> Sweep:
    return Sweep.parse("mini_mtil", words, samples, seed)


def score(values: dict[str, str]) -> float:
    """Best at a rate of 1e-2."""
    return 50 - 10 * (math.log10(float(values["train.lr"])) + 2) ** 2


def drawn(sweep: Sweep, count: int, sampler: str = "tpe", score: Callable = score) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for _ in range(count):
        values = draw(sweep, outcomes, sampler)
        outcomes.append(Outcome(values, "complete", (score(values),)))
    return outcomes


def test_the_sampler_goes_where_points_were_good_and_draws_the_same_again() -> None:
    found = drawn(sweep_of(LR), 24)
    early, late = ([score(outcome.values) for outcome in part] for part in (found[:10], found[14:]))
    assert sum(late) / len(late) > sum(early) / len(early) + 5
    assert [outcome.values for outcome in drawn(sweep_of(LR), 24)] == [outcome.values for outcome in found]
    assert draw(sweep_of(LR, seed=1), [], "tpe") != found[0].values
    # what is drawn depends on what came of the others, which a random sampler does not ask
    upside_down = drawn(sweep_of(LR), 24, score=lambda values: -score(values))
    assert [outcome.values for outcome in upside_down[14:]] != [outcome.values for outcome in found[14:]]
    random = [drawn(sweep_of(LR), 12, "random", rule)[-1].values for rule in (score, lambda values: -score(values))]
    assert random[0] == random[1]


def test_numbers_stay_in_their_ranges_and_alternatives_among_theirs() -> None:
    sweep = sweep_of("train.lr=uniform(0.01, 0.02)", "options.rank=integer(2, 5)", "seed=0,7")
    for outcome in drawn(sweep, 20, score=lambda values: float(values["seed"])):
        assert 0.01 <= float(outcome.values["train.lr"]) <= 0.02
        assert outcome.values["options.rank"] in "2345" and outcome.values["seed"] in ("0", "7")


def test_no_point_is_drawn_twice_and_there_is_an_end() -> None:
    sweep = sweep_of("seed=0,1,2")
    found = drawn(sweep, 3, score=lambda values: 1.0)
    assert sorted(outcome.values["seed"] for outcome in found) == ["0", "1", "2"]
    assert draw(sweep, found, "tpe") is None


def test_a_point_falls_behind_below_the_median_of_those_that_went_as_far() -> None:
    sweep = sweep_of(LR)
    others = [Outcome({"train.lr": f"{lr:.4g}"}, "complete", curve) for lr, curve in CURVES.items()]
    # after the first task the others had 10, 20, 30, 40: a median of 25; after the second 50, 60, 70, 80
    for curve, expected in (
        ((24.0,), True),
        ((26.0,), False),
        ((26.0, 64.0), True),
        ((26.0, 66.0), False),
        ((), False),
    ):
        running = Outcome({"train.lr": "0.05"}, "running", curve)
        assert falls_behind(sweep, [*others, running], 4) is expected
    assert not falls_behind(sweep, [*others[:3], Outcome({"train.lr": "0.05"}, "running", (1.0,))], 3), "too few others"


CURVES = {1e-4: (10.0, 50.0), 1e-3: (20.0, 60.0), 1e-2: (30.0, 70.0), 2e-2: (40.0, 80.0)}


@dataclass
class Cluster:
    """Runs a task of each job at every look; a job's curve is (score / 2, score)."""

    folder: Path
    finish: Callable[[str], bool] = lambda name: True
    jobs: dict[str, int] = field(default_factory=dict)  # point -> tasks done
    states: dict[str, str] = field(default_factory=dict)
    submitted: list[str] = field(default_factory=list)
    most_at_a_time: int = 0

    def submit(self, submissions, profile, jobs_folder, name) -> None:
        (submission,) = submissions
        point = submission.run_dir.name
        self.submitted.append(point)
        self.jobs[point], self.states[point] = 0, "running"
        self.most_at_a_time = max(self.most_at_a_time, list(self.states.values()).count("running"))
        submission.run_dir.mkdir(parents=True, exist_ok=True)
        (submission.run_dir / "config.yaml").write_text(submission.config.dump())

    def sleep(self, seconds: float) -> None:
        for point in [name for name, state in self.states.items() if state == "running"]:
            self.jobs[point] += 1
            value = score(dict([point.split("=")]))
            rows = [[1.0], [value / 2], [value]][: self.jobs[point] + 1]
            metrics = {"accuracy": rows, "last": value if len(rows) == 3 else None}
            (self.folder / point / "metrics.json").write_text(json.dumps(metrics))
            if len(rows) == 3:
                self.states[point] = "finished" if self.finish(point) else "failed"

    def describe_runs(self, run_dirs) -> list[RunState]:
        return [self._describe(path) for path in run_dirs]

    def _describe(self, path: Path) -> RunState:
        state = self.states.get(path.name, "unknown")
        job = JobRecord("local", path.name, "")
        return RunState(path, state, job=job, job_time_left="unlimited" if state == "running" else None)

    def cancel(self, record: JobRecord) -> None:
        self.states[record.job_id] = "stopped"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster(tmp_path / "s")
    for name in ("submit", "describe_runs", "cancel"):
        monkeypatch.setattr(search, name, getattr(found, name))
    monkeypatch.setattr(search.time, "sleep", found.sleep)
    return found


def search_of(cluster: Cluster, **options) -> Search:
    profile = ClusterProfile.load(None, {"cluster": "local"})
    return Search(sweep_of(LR), cluster.folder, profile, "s", "tpe", **options)


def test_as_many_points_as_asked_for_are_trained_two_at_a_time(cluster: Cluster) -> None:
    points = search_of(cluster, parallel=2).run()
    assert len(points) == 8 == len(cluster.submitted) and cluster.most_at_a_time == 2
    assert all(point.config.data.evaluate_on == "validation" for point in points)
    assert set(cluster.states.values()) == {"finished"}


def test_the_same_command_goes_on_with_what_failed_and_what_is_missing(cluster: Cluster) -> None:
    first = search_of(cluster)
    cluster.finish = lambda name: len(cluster.submitted) != 2  # the second one fails
    monkey, search.time.sleep = search.time.sleep, interrupted_after(cluster, 3)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    search.time.sleep = monkey
    before = list(cluster.submitted)
    assert len(before) == 3
    search_of(cluster).run()
    assert cluster.submitted[3] == before[1], "what failed is first"
    assert len(set(cluster.submitted)) == 8 and len(cluster.submitted) == 9


def interrupted_after(cluster: Cluster, submissions: int) -> Callable[[float], None]:
    def sleep(seconds: float) -> None:
        cluster.sleep(seconds)
        if len(cluster.submitted) == submissions and "running" not in cluster.states.values():
            raise KeyboardInterrupt

    return sleep


def test_points_that_fall_behind_end_early_and_the_table_says_so(cluster: Cluster) -> None:
    points = search_of(cluster, prunes=True).run()
    stopped = [name for name, state in cluster.states.items() if state == "stopped"]
    assert stopped and len(points) == 8
    done = {point.name: score(point.values) for point in points}
    for name in stopped:
        place = cluster.submitted.index(name)
        earlier = sorted(done[other] for other in cluster.submitted[:place])
        assert cluster.jobs[name] == 1 and place >= 4
        assert done[name] < earlier[-1], "not the best by then"
    search_of(cluster, prunes=True).run()
    assert len(cluster.submitted) == 8, "what was told to end is not trained again"
    rows = {row.name: row for row in write_sweep_table(cluster.folder)}
    assert {rows[name].state for name in stopped} == {"pruned after 1"}


def test_the_best_point_becomes_a_recipe(cluster: Cluster) -> None:
    points = search_of(cluster).run()
    for point in points:
        (cluster.folder / point.name / "status.json").write_text(json.dumps({"state": "finished"}))
    path = write_best(cluster.folder, best_of(write_sweep_table(cluster.folder)))
    expected = max(points, key=lambda point: score(point.values))
    recipe = load_config(path)
    assert recipe.train.lr == float(expected.values["train.lr"]) and recipe.data.evaluate_on == "test"
    assert recipe.run_dir == Path("runs/best") and path.read_text().startswith(
        "# The best of s by Last, on the validation"
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["seed=0,1", "--sampler", "tpe"], "say how many: --samples N"),
        (["seed=0,1", "--prune", "--samples", "3", "--cluster", "debug"], "cluster=debug"),
        (["--sampler", "tpe", "--samples", "3"], "needs a parameter with several values"),
        (["seed=0,1", "run_dir=x", "--sampler", "tpe", "--samples", "3", "--cluster", "local"], "run_dir"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, capsys, words: list[str], reason: str) -> None:
    code = run_command("submit", ["sweep", "--recipe", "mini_mtil", "--folder", str(tmp_path / "s"), *words])
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and reason in line
