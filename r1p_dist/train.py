"""The story of a run: for each task fit, merge, evaluate on all tasks, save."""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version

import deepspeed
import torch

from r1p_dist.backbones import load_backbone, weights_identity
from r1p_dist.backbones.backbone import Batch
from r1p_dist.config import RunConfig, TrainConfig
from r1p_dist.data import Encoder, Stream, Task, TrainLoader, evaluation_loaders, train_loader
from r1p_dist.distributed import CollectiveCounter, agree, rank, world_size
from r1p_dist.engine import TaskEngine, choose_precision, resolve_deepspeed, start_process_group, weights_placement
from r1p_dist.errors import InputError, Interrupted
from r1p_dist.evaluation.evaluator import Evaluator
from r1p_dist.evaluation.make import make_evaluator
from r1p_dist.evaluation.metrics import continual_metrics
from r1p_dist.evaluation.results import TaskResult
from r1p_dist.host_copy import on_device
from r1p_dist.interrupts import Finding, StepAgreement, Watchdog
from r1p_dist.methods import make_method
from r1p_dist.protocol import Method, Stage
from r1p_dist.report import write_report
from r1p_dist.session import Running, Session
from r1p_dist.trainer import TaskTrainer


def run(config: RunConfig, lock_patience_s: float = 0) -> dict:
    """Trains the stream of a configuration and returns its metrics, as in metrics.json.

    A run that was interrupted resumes from its newest checkpoint. lock_patience_s: how long to wait for the processes
    of a start before this one to leave the run folder. Raises InputError before any training, or where training cannot
    go on; Interrupted when a signal ended it.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    device = start_process_group()
    torch.manual_seed(config.seed * world_size() + rank())  # dropout differs between ranks
    stream = Stream.load(config.stream, config.order, config.tasks).extended(config.extend)
    stream.check_names(config.train.per_task, "train.per_task")
    backbone = load_backbone(config.backbone, weights_placement(config, device), config.train.compile)
    backbone.check(stream)
    versions = {module.__name__: module.__version__ for module in (torch, deepspeed)}
    versions |= {"open_clip": version("open_clip_torch"), "transformers": version("transformers")}
    facts = {"backbone": agree(lambda: weights_identity(config.backbone, backbone)), "versions": versions}
    method = make_method(config, backbone)
    stages = method.stages(stream)
    reference = Stream.load(config.data.reference).tasks if config.data.reference else ()
    encoder = backbone.encoder(config.data)
    loaders = [
        train_loader(config, stage.tasks, stage.iterations, encoder, past=_tasks(stages[:index]), reference=reference)
        for index, stage in enumerate(stages)
    ]
    further = [
        {
            name: train_loader(config, request.tasks, stage.iterations, encoder)
            for name, request in method.further_data(stage, _tasks(stages[:index])).items()
        }
        for index, stage in enumerate(stages)
    ]
    test_loaders = evaluation_loaders(config, stream.tasks, encoder)
    limit = config.faults.hang_minutes
    watchdog = Watchdog(60 * limit if limit else math.inf, config.run_dir / "stacks")
    session = Session(config, method, stages, facts, lock_patience_s)
    agreement = StepAgreement(device)
    evaluator = make_evaluator(
        config.evaluation, backbone, test_loaders, partial(stop_if_asked, agreement, session), watchdog.moved
    )
    try:
        return train_stream(stream, loaders, further, encoder, evaluator, session, agreement, watchdog)
    finally:
        watchdog.stop()
        session.close()


def train_stream(
    stream: Stream,
    loaders: Sequence[TrainLoader],
    further: Sequence[Mapping[str, TrainLoader]],
    encoder: Encoder,
    evaluator: Evaluator,
    session: Session,
    agreement: StepAgreement,
    watchdog: Watchdog,
) -> dict:
    """Trains the stages that the session has yet to do and returns the metrics of all."""
    config, method, stages, log, progress = (
        session.config,
        session.method,
        session.stages,
        session.log,
        session.progress,
    )
    backbone = method.backbone
    log.say(f"{config.method} on {stream.name}: {len(stream.tasks)} tasks, {world_size()} ranks")
    log.say("precision {}: {}".format(*choose_precision(config)))
    log.status("starting")
    progress.before_merge += [None] * (len(stream.tasks) - len(progress.before_merge))
    if session.point:
        log.say(f"resumes from {session.point.folder}")
    for index in range(session.first_stage, len(stages)):
        stage, loader = stages[index], loaders[index]
        if method.trains:
            train = method.train_config(stage)
            make_engine = partial(TaskEngine, backbone, config, train, world_size(), agreement.exchange)
            scan_loader = partial(_scan_loader, config, stage, encoder)
            running = session.open_stage(index, loader, make_engine, agreement, scan_loader, further[index])
        model = running.model if method.trains else backbone
        if progress.rows and len(progress.rows[0]) < len(stream.tasks):
            log.status("evaluating")
            evaluate_added(evaluator, model, stream, index, session)
        if not progress.rows:
            log.status("evaluating")
            results = evaluate(evaluator, model, stream, session)
            progress.left_out = [result.left_out for result in results]
        if method.trains:
            fit(running, session, agreement, watchdog)
            log.status("merging", stage.name)
            with method.before_merge():
                log.status("evaluating", stage.name)
                for result in evaluator.evaluate(model, stage.tasks):
                    progress.before_merge[[task.name for task in stream.tasks].index(result.task)] = result.score
            log.status("merging", stage.name)
            method.end(stage, running.trainer)
            session.finish_stage(index)
            log.status("evaluating", stage.name)
            evaluate(evaluator, model, stream, session)
            progress.replaced.append(loader.bad_samples)
            model.close()
            log.status("saving", stage.name)
            session.save_task(index)
        else:
            progress.rows.append(progress.rows[0])
            progress.following += progress.following[:1]
        metrics = make_metrics(stream, session)
        log.metrics(metrics)
        log.say(summary(index, stage, stages, metrics))
    session.checkpoints.wait()
    metrics = make_metrics(stream, session)
    log.metrics(metrics)
    log.status("finished", steps_left=0)
    if rank() == 0:
        write_report(config.run_dir)
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
        "world_size": world_size(),
        "zero_stage": resolve_deepspeed(config, world_size())["zero_optimization"]["stage"],
        "collectives_per_step": progress.collectives,
        "bad_samples": {"train": progress.replaced, "evaluation": progress.left_out},
        "method": config.method,
        "seed": config.seed,
        "versions": session.facts["versions"],
        "wall_seconds": round(session.seconds, 1),
    }


def fit(running: Running, session: Session, agreement: StepAgreement, watchdog: Watchdog) -> None:
    """Trains one stage from where it stands: the loop over micro batches, for every method and backbone."""
    stage, loader, model = running.stage, running.loader, running.model
    config, method, log = session.config, session.method, session.log
    method.backbone.train()
    log.begin_stage(stage.name, stage.iterations, running.step)
    log.status("training", stage.name, running.step, session.steps_left(running))
    waited, since, seen = 0.0, time.perf_counter(), 0
    device = method.backbone.device
    collectives = CollectiveCounter()
    steps = on_device(loader.steps(), method.backbone.preparer(loader.prompts), device)
    while running.step < stage.iterations:
        asked = time.perf_counter()
        batches = next(steps)
        waited += time.perf_counter() - asked
        lr = model.lr
        # the second step stands for all: lagged votes run by then
        with collectives if running.step == 1 else nullcontext():
            train_step(method, running.trainer, batches, config.train)
        watchdog.moved()
        seen += len(batches)
        running.step += 1
        running.trainer.step_number = running.step
        if running.step == 2:
            session.progress.collectives = collectives.summary()
        is_last, every = running.step == stage.iterations, config.checkpoint.every_steps
        is_saved = bool(every) and running.step % every == 0 and not is_last
        # what the step before found, so that the host never waits for this one; all is known before anything is saved
        stop = act_on(agreement.findings(keep=0 if is_saved or is_last else 1), running, session)
        if running.step % config.log.every_steps == 0 or is_last:
            means, faults = running.meter.read(loader.count_new_faults())
            seconds = time.perf_counter() - since
            samples = seen * config.train.global_batch_size / config.train.gradient_accumulation_steps
            values = means | {"lr": lr}
            values |= {"samples_per_second": round(samples / seconds, 2), "data_wait": round(waited / seconds, 4)}
            log.step(stage.name, running.step, values)
            log.status("training", stage.name, running.step, session.steps_left(running))
            if faults:
                loader.check_faults()
            waited, since, seen = 0.0, time.perf_counter(), 0
        if stop or is_saved:
            stop = act_on(agreement.findings(), running, session) or stop
            session.save_step(running)
        if stop:
            session.wait_on_all_ranks()
            log.status("stopped", stage.name, running.step, session.steps_left(running))
            raise Interrupted(
                f"{stop.name} at task {stage.name} step {running.step}: saved in {session.last_saved}; the same "
                "command resumes there",
                stop,
            )
    log.end_stage()


def train_step(method: Method, trainer: TaskTrainer, batches: Sequence[Batch], train: TrainConfig) -> None:
    """One optimizer step of its micro batches; the host waits for nothing."""
    method.backbone.begin_step(batches, train)
    method.step(trainer, batches)
    method.after_step(trainer)


def act_on(findings: Iterable[Finding], running: Running, session: Session) -> signal.Signals | None:
    """Returns the signal that any rank got. InputError: a step was not finite and `faults.not_finite` is stop."""
    stop = None
    for finding in findings:
        stop = finding.signal or stop
        if not finding.not_finite:
            continue
        step = f"{running.stage.name} step {finding.step}"
        if session.config.faults.not_finite == "stop":
            raise InputError(
                f"task {step}: the loss or a gradient is not finite; the last good checkpoint: {session.last_saved}; "
                f"try a smaller train.lr than {running.model.lr}, or faults.not_finite=skip"
            )
        session.log.say(f"{step}: the loss or a gradient is not finite, the step is skipped")
    return stop


def stop_if_asked(agreement: StepAgreement, session: Session) -> None:
    """Ends the run between two evaluations when any rank got a signal; what was evaluated by then is done again."""
    if stop := agreement.stop_signal():
        session.wait_on_all_ranks()
        session.log.status("stopped")
        raise Interrupted(
            f"{stop.name} in an evaluation: the same command resumes from {session.last_saved or 'the beginning'}", stop
        )


def evaluate(evaluator: Evaluator, model: Callable, stream: Stream, session: Session) -> list[TaskResult]:
    """Evaluates all tasks, and adds a row to the accuracy matrix and what belongs to it."""
    progress, row = session.progress, len(session.progress.rows)
    results = evaluator.evaluate(model, stream.tasks)
    for result in results:
        session.log.result(row, result)
    progress.rows.append([result.score for result in results])
    if following := _following(results):
        progress.following.append(following)
    return results


def evaluate_added(evaluator: Evaluator, model: Callable, stream: Stream, index: int, session: Session) -> None:
    """Fills the columns of tasks that were added to a finished run: each past model is made again and evaluated."""
    rows, method = session.progress.rows, session.method
    added = stream.tasks[len(rows[0]) :]
    for count, row in enumerate(rows):
        session.deploy(method.deployed(count))
        results = evaluator.evaluate(model, added)
        for result in results:
            session.log.result(count, result)
        row += [result.score for result in results]
        if session.progress.following:
            session.progress.following[count] += _following(results)
        if count == 0:
            session.progress.left_out += [result.left_out for result in results]
    session.deploy(method.merged(index))


def _following(results: Iterable[TaskResult]) -> list[float]:
    """Returns the share of answers that keep to the form, task by task; nothing for classification."""
    return [result.following for result in results if result.following is not None]


def _scan_loader(config: RunConfig, stage: Stage, encoder: Encoder, batches: int | None) -> TrainLoader:
    """Returns a loader of a stage's own samples for `Trainer.scan`; None: as many global batches as an epoch has."""
    loader = train_loader(config, stage.tasks, batches or 1, encoder)
    if batches is None:
        loader = train_loader(config, stage.tasks, loader.steps_per_epoch, encoder)
    return loader


def _tasks(stages: Sequence[Stage]) -> list[Task]:
    return [task for stage in stages for task in stage.tasks]


def summary(index: int, stage: Stage, stages: Sequence[Stage], metrics: dict) -> str:
    zero_shot, row = metrics["accuracy"][0], metrics["accuracy"][-1]
    mean = sum(row) / len(row)
    own = ""
    if len(stage.tasks) == 1 and metrics["before_merge"][index] is not None:
        own = f"own task {zero_shot[index]:.1f} -> {metrics['before_merge'][index]:.1f} -> merged {row[index]:.1f}, "
    everything = f"all tasks {mean:.2f} (zero-shot {sum(zero_shot) / len(row):.2f})"
    return f"[{index + 1}/{len(stages)}] {stage.name}: {own}{everything}"
