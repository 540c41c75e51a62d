"""The runs that are watched: what they say by now, as pages."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

from r1p_dist.cluster.runs import RunState, describe_without_cluster, find_runs
from r1p_dist.evaluation.score_matrix import means_of
from r1p_dist.files import read_mapping
from r1p_dist.page.charts import COLOURS, axis, layout, line, plain
from r1p_dist.page.parts import Chart, Link, Page, Part, Section, Table, number
from r1p_dist.report.run import RunFiles
from r1p_dist.report.write import report_page
from r1p_dist.run_files import (
    ANSWERS_FILE,
    CONFIG_FILE,
    CORRECT_FILE,
    JOB_FILE,
    LOG_FILE,
    METRICS_FILE,
    STATUS_FILE,
)

_FILES = (STATUS_FILE, METRICS_FILE, LOG_FILE, CORRECT_FILE, ANSWERS_FILE, CONFIG_FILE, JOB_FILE)
_OVER = ("finished", "failed", "died")


class Watched:
    """A run, or all runs in a folder; those that begin later are found as well.

    InputError: there is no such folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.is_one = any((root / name).is_file() for name in (STATUS_FILE, JOB_FILE))
        self.runs()

    def runs(self) -> dict[str, Path]:
        """Returns the folder of each run, by its path in the folder that is watched."""
        found = [self.root] if self.is_one else find_runs([self.root])
        return {run.relative_to(self.root).as_posix(): run for run in found}

    def states(self) -> dict[str, RunState]:
        """Returns how each run stands, by name."""
        return {name: describe_without_cluster(run) for name, run in self.runs().items()}

    def is_over(self) -> bool:
        """Whether no run goes on, or will. A job that was stopped may be queued again by itself."""
        return all(
            state.state in _OVER or (state.state == "stopped" and not (state.run_dir / JOB_FILE).is_file())
            for state in self.states().values()
        )

    def tag(self, name: str | None) -> str:
        """Returns a text that is another one when anything of a run has changed. name: None for the list of all."""
        runs = [run for own, run in self.runs().items() if name in (None, own)]
        return "-".join(f"{size:x}.{time:x}" for run in runs for size, time in map(_stamp, [run / f for f in _FILES]))

    def page(self, name: str | None) -> Page:
        """Returns the page of a run, or of the list of all. KeyError: there is no such run."""
        if name is None:
            return self._list()
        run = self.runs()[name]
        page, state = report_page(RunFiles.read(run, is_begun=True), has_files=False), describe_without_cluster(run)
        facts = ["its process is gone, so it has died", *page.facts] if state.state == "died" else page.facts
        return replace(page, facts=facts)

    def _list(self) -> Page:
        states = self.states()
        means = {name: means_of(read_mapping(state.run_dir / METRICS_FILE)) for name, state in states.items()}
        rows = []
        for name, state in states.items():
            left = "" if state.seconds_left is None else str(timedelta(seconds=round(state.seconds_left)))
            mean = number(means[name][-1] if means[name] else None)
            rows.append([Link(name, f"/{quote(name)}"), state.method or "–", _doing(state), mean, left])
        table = Table(["run", "method", "now", "mean of all tasks", "time left"], rows, frozenset({3, 4}))
        going = sum(state.state not in (*_OVER, "stopped") for state in states.values())
        lead = f"{going} of {len(states)} run{'s' * (len(states) != 1)} go on." if going else "No run goes on."
        return Page(f"Runs in {self.root.resolve().name}", lead, sections=[Section("Runs", [table, *_curves(means)])])


def _doing(state: RunState) -> str:
    place = " ".join([f" {state.task}" if state.task else "", f"step {state.step}" if state.step is not None else ""])
    is_training = state.state == "training" and state.samples_per_second
    speed = f", {state.samples_per_second:g} samples per second" if is_training else ""
    return f"{state.state}{place.rstrip()}{speed}" if state.state not in _OVER else state.state


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _curves(means: dict[str, list[float]]) -> list[Part]:
    drawn = {name: values for name, values in means.items() if len(values) > 1}
    if not drawn:
        return []
    lines = [
        line(plain(name), list(range(len(values))), values, COLOURS[at % len(COLOURS)])
        | {"mode": "lines+markers", "hovertemplate": f"{plain(name)}, %{{x}} tasks: %{{y:.1f}}<extra></extra>"}
        for at, (name, values) in enumerate(drawn.items())
    ]
    look = layout(axis("tasks trained", dtick=1), axis("mean of all tasks"), showlegend=len(lines) > 1)
    return [Chart("Mean of all tasks after each task", lines, look, 340)]
