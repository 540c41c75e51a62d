"""What a run measures between its stages, and what metrics.json says of it."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from statistics import mean

from r1p_dist.data import Stream, Task
from r1p_dist.distributed import world_size
from r1p_dist.engine import resolve_deepspeed
from r1p_dist.errors import Interrupted
from r1p_dist.evaluation.evaluator import Evaluator
from r1p_dist.evaluation.metrics import continual_metrics
from r1p_dist.evaluation.results import TaskResult
from r1p_dist.interrupts import StepAgreement
from r1p_dist.protocol import Stage
from r1p_dist.session import Session


class Scores:
    """Evaluates the models of a run and keeps what it found in the session's progress.

    model: the backbone, or the engine around it, with the weights of the moment.
    """

    def __init__(self, stream: Stream, evaluator: Evaluator, session: Session) -> None:
        self._stream, self._evaluator, self._session, self._log = stream, evaluator, session, session.log
        self._progress = session.progress
        self._progress.before_merge += [None] * (len(stream.tasks) - len(self._progress.before_merge))

    def begin(self, model: Callable, index: int) -> None:
        """Evaluates before stage `index` what is missing: the pristine model, or tasks added to a finished run."""
        rows = self._progress.rows
        if rows and len(rows[0]) < len(self._stream.tasks):
            self._log.status("evaluating")
            self._evaluate_added(model, index)
        if not rows:
            results = self.add_row(model)
            self._progress.left_out = [result.left_out for result in results]

    def before_merge(self, model: Callable, stage: Stage) -> None:
        """Evaluates the stage's own tasks, with all that was trained."""
        self._log.status("evaluating", stage.name)
        names = [task.name for task in self._stream.tasks]
        for result in self._evaluate(model, stage.tasks, f"{stage.name} before the merge"):
            self._progress.before_merge[names.index(result.task)] = result.score

    def add_row(self, model: Callable, stage: Stage | None = None) -> list[TaskResult]:
        """Evaluates all tasks after a stage, or before the first: a row of the accuracy matrix."""
        self._log.status("evaluating", *([stage.name] if stage else []))
        row = len(self._progress.rows)
        what = f"all tasks after {stage.name}" if stage else "zero-shot"
        results = self._evaluate(model, self._stream.tasks, what) if row < 2 else self._evaluate_drift(model, row, what)
        for result in results:
            self._log.result(row, result)
        self._progress.rows.append([result.score for result in results])
        if following := _following(results):
            self._progress.following.append(following)
        return results

    def _evaluate_drift(self, model: Callable, row: int, what: str) -> list[TaskResult]:
        """Evaluates all tasks after a stage, and how far it moved the layers' outputs on the tasks before it."""
        session, index = self._session, row - 1
        drift = session.start_drift(index)
        past = {task.name for stage in session.stages[:index] for task in stage.tasks}
        results = self._evaluate(
            model, self._stream.tasks, what, lambda task: drift.watch() if task.name in past else nullcontext()
        )
        session.drift = drift.by_layer()
        return results

    def repeat_row(self) -> None:
        """Adds the first row again: nothing was trained."""
        self._progress.rows.append(self._progress.rows[0])
        self._progress.following += self._progress.following[:1]

    def _evaluate_added(self, model: Callable, index: int) -> None:
        """Fills the columns of added tasks: each past model is made again and evaluated."""
        rows, method = self._progress.rows, self._session.method
        added = self._stream.tasks[len(rows[0]) :]
        for count, row in enumerate(rows):
            self._session.deploy(method.deployed(count))
            results = self._evaluate(model, added, f"added tasks after {count} of the others")
            for result in results:
                self._log.result(count, result)
            row += [result.score for result in results]
            if self._progress.following:
                self._progress.following[count] += _following(results)
            if count == 0:
                self._progress.left_out += [result.left_out for result in results]
        self._session.deploy(method.merged(index))

    def _evaluate(
        self,
        model: Callable,
        tasks: Sequence[Task],
        what: str,
        watch: Callable[[Task], AbstractContextManager] = nullcontext,
    ) -> list[TaskResult]:
        self._log.begin(what, sum(len(self._evaluator.loaders[task.name]) for task in tasks))
        try:
            return self._evaluator.evaluate(model, tasks, watch)
        finally:
            self._log.end()

    def write(self) -> dict:
        """Writes metrics.json and returns its content."""
        metrics = make_metrics(self._stream, self._session)
        self._log.metrics(metrics)
        return metrics


def make_metrics(stream: Stream, session: Session) -> dict:
    """Returns the content of metrics.json for what the run has found by now."""
    config, method, progress = session.config, session.method, session.progress
    return {
        "tasks": [task.name for task in stream.tasks],
        "metric": [task.metric for task in stream.tasks],
        "domains": [task.domain for task in stream.tasks],
        "accuracy": progress.rows,
        "before_merge": progress.before_merge,
        **({"instruction_following": progress.following} if progress.following else {}),
        **continual_metrics(progress.rows + [None] * (len(session.stages) + 1 - len(progress.rows))),
        "trainable_parameters": method.count_parameters(),
        "inference": method.inference,
        "world_size": world_size(),
        "zero_stage": resolve_deepspeed(config, world_size())["zero_optimization"]["stage"],
        "collectives_per_step": progress.collectives,
        "bad_samples": {"train": progress.replaced, "evaluation": progress.left_out},
        "method": config.method,
        "seed": config.seed,
        "versions": session.facts["versions"],
        "wall_seconds": round(session.seconds, 1),
    }


def _following(results: Iterable[TaskResult]) -> list[float]:
    """Returns the share of answers that keep to the form, task by task; nothing for classification."""
    return [result.following for result in results if result.following is not None]


def summary(index: int, stage: Stage, stages: Sequence[Stage], metrics: dict) -> str:
    """Returns a line that says what a stage brought."""
    zero_shot, row = metrics["accuracy"][0], metrics["accuracy"][-1]
    mean = sum(row) / len(row)
    own = ""
    if len(stage.tasks) == 1 and metrics["before_merge"][index] is not None:
        own = f"own task {zero_shot[index]:.1f} -> {metrics['before_merge'][index]:.1f} -> merged {row[index]:.1f}, "
    everything = f"all tasks {mean:.2f} (zero-shot {sum(zero_shot) / len(row):.2f})"
    return f"[{index + 1}/{len(stages)}] {stage.name}: {own}{everything}"


def ending(metrics: dict, report: Path) -> str:
    """Returns what a finished run says: what came out, what the merge cost, and where the report is."""
    rows, before = metrics["accuracy"], metrics["before_merge"]
    words = [f"last {metrics['last']:.1f} (zero-shot {mean(rows[0]):.1f})"]
    if metrics["forgetting"] is not None:
        words.append(f"forgetting {metrics['forgetting']:.1f}")
    if len(rows) == len(before) + 1 and None not in before:
        own = mean(row[index] for index, row in enumerate(rows[1:]))
        words.append(f"own {mean(before):.1f} before the merge, {own:.1f} after")
    bad = metrics["bad_samples"]
    if any(bad["train"]) or any(bad["evaluation"]):
        words.append(f"unusable samples: {sum(bad['train'])} replaced, {sum(bad['evaluation'])} not evaluated")
    return f"finished in {timedelta(seconds=round(metrics['wall_seconds']))}: {'; '.join(words)}\nreport: {report}"


def stop_if_asked(agreement: StepAgreement, session: Session) -> None:
    """Ends the run between two evaluations when any rank got a signal; what was evaluated by then is done again."""
    if stop := agreement.stop_signal():
        session.wait_on_all_ranks()
        session.log.status("stopped")
        raise Interrupted(
            f"{stop.name} in an evaluation: the same command resumes from {session.last_saved or 'the beginning'}", stop
        )
