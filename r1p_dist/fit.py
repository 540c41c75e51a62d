"""The loop over the steps of one stage, for every method and backbone."""

import resource
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch

from r1p_dist.backbones.backbone import Batch
from r1p_dist.config import TrainConfig
from r1p_dist.distributed import CollectiveCounter
from r1p_dist.errors import InputError, Interrupted
from r1p_dist.host_copy import on_device
from r1p_dist.interrupts import Finding, StepAgreement, Watchdog
from r1p_dist.protocol import Method
from r1p_dist.session import Running, Session
from r1p_dist.trainer import TaskTrainer


def fit(running: Running, session: Session, agreement: StepAgreement, watchdog: Watchdog) -> None:
    """Trains one stage from where it stands."""
    stage, loader, model = running.stage, running.loader, running.model
    config, method, log = session.config, session.method, session.log
    method.backbone.train()
    log.begin(stage.name, stage.iterations, running.step)
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
        log.advance(session.steps_left(running))
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
            values["memory_gb"] = round(_peak_memory() / 1e9, 3)
            log.step(stage.name, running.step, values)
            log.status("training", stage.name, running.step, session.steps_left(running))
            if faults:
                loader.check_faults()
            waited, since, seen = 0.0, time.perf_counter(), 0
        if stop or is_saved:
            stop = act_on(agreement.findings(), running, session) or stop
            session.save_step(running)
        if stop:
            is_saved = session.wait_on_all_ranks()
            log.status("stopped", stage.name, running.step, session.steps_left(running))
            saved = f"saved in {session.last_saved}; the same command resumes there"
            if not is_saved:
                saved = f"not saved, the same command resumes from {session.last_saved or 'the beginning'}"
            raise Interrupted(f"{stop.name} at task {stage.name} step {running.step}: {saved}", stop)
    log.end()


def _peak_memory() -> int:
    """Returns the most bytes that this rank has used: of its accelerator, or of its process where it has none."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
