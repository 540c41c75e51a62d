"""The story of a run: for each stage fit, merge, evaluate on all tasks, save."""

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version

import deepspeed
import torch

from r1p_dist.backbones import load_backbone, weights_identity
from r1p_dist.config import RunConfig
from r1p_dist.data import Stream, evaluation_loaders
from r1p_dist.data.task_list import write_tasks
from r1p_dist.distributed import agree, rank, world_size
from r1p_dist.engine import TaskEngine, start_process_group, weights_placement
from r1p_dist.errors import Interrupted, one_line
from r1p_dist.evaluation.make import make_evaluator
from r1p_dist.fit import fit
from r1p_dist.interrupts import StepAgreement, Watchdog
from r1p_dist.memory_faults import memory_faults_named
from r1p_dist.methods import make_method
from r1p_dist.precision import choose_precision
from r1p_dist.run_files import REPORT_FILE
from r1p_dist.scores import Scores, ending, stop_if_asked, summary
from r1p_dist.session import Session
from r1p_dist.stage_data import StageData, stage_data


def run(config: RunConfig, lock_patience_s: float = 0) -> dict:
    """Trains the stream of a configuration and returns its metrics, as in metrics.json.

    A run that was interrupted resumes from its newest checkpoint. lock_patience_s: how long to wait for the processes
    of a start before this one to leave the run folder. Raises InputError before any training, or where training cannot
    go on; Interrupted when a signal ended it.
    """
    with memory_faults_named(config):
        return _run(config, lock_patience_s)


def _run(config: RunConfig, lock_patience_s: float) -> dict:
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
    data = [stage_data(config, method, stages, index, encoder, reference) for index in range(len(stages))]
    test_loaders = evaluation_loaders(config, stream.tasks, encoder)
    limit = config.faults.hang_minutes
    watchdog = Watchdog(60 * limit if limit else math.inf, config.run_dir / "stacks")
    session = Session(config, method, stages, facts, lock_patience_s)
    if rank() == 0:
        write_tasks(config.run_dir, stream.tasks)
    agreement = StepAgreement(device)
    stop = partial(stop_if_asked, agreement, session)

    def on_batch() -> None:
        watchdog.moved()
        session.log.advance()

    evaluator = make_evaluator(config.evaluation, backbone, test_loaders, stop, on_batch)
    evaluator.select = method.select
    try:
        session.log.say(f"{config.method} on {stream.name}: tasks: {len(stream.tasks)}, ranks: {world_size()}")
        return train_stages(data, session, Scores(stream, evaluator, session), agreement, watchdog)
    except Interrupted:
        raise
    except BaseException:
        with suppress(OSError):
            session.log.status("failed")
        raise
    finally:
        session.log.end()
        watchdog.stop()
        session.close()
        agreement.close()  # last: a signal does again what it did before, which may end the process


def train_stages(
    data: Sequence[StageData], session: Session, scores: Scores, agreement: StepAgreement, watchdog: Watchdog
) -> dict:
    """Trains the stages that the session has yet to do and returns the metrics of all."""
    config, method, log = session.config, session.method, session.log
    log.say("precision {}: {}".format(*choose_precision(config.train.precision)))
    log.status("starting")
    if session.point:
        log.say(f"resumes from {session.point.folder}")
    for index, stage in list(enumerate(session.stages))[session.first_stage :]:
        if method.trains:
            train = method.train_config(stage)
            make_engine = partial(TaskEngine, method.backbone, config, train, world_size(), agreement.exchange)
            running = session.open_stage(index, data[index], make_engine, agreement)
            scores.begin(running.model, index)
            fit(running, session, agreement, watchdog)
            log.status("merging", stage.name)
            log.begin(f"{stage.name}: merge", 1)
            with method.before_merge():
                scores.before_merge(running.model, stage)
            log.status("merging", stage.name)
            log.begin(f"{stage.name}: merge", 1)
            method.end(stage, running.trainer)
            session.finish_stage(index)
            scores.add_row(running.model, stage)
            session.progress.replaced.append(running.loader.bad_samples)
            running.model.close()
            log.status("saving", stage.name)
            log.begin(f"{stage.name}: save", 1)
            session.save_task(index)
            log.end()
        else:
            scores.begin(method.backbone, index)
            scores.repeat_row()
        log.say(summary(index, stage, session.stages, scores.write()))
        if index + 1 < len(session.stages):
            write_page(session)
    session.checkpoints.wait()
    metrics = scores.write()
    write_page(session)
    log.status("finished", steps_left=0)  # not before: a run that is ended while it draws is to draw again
    log.say(ending(metrics, config.run_dir / REPORT_FILE))
    return metrics


def write_page(session: Session) -> None:
    """Writes report.html on rank 0; no run ends because something of its page cannot be shown."""
    if rank() == 0:
        from r1p_dist.report.write import write_report  # its libraries are for this rank and moment alone

        try:
            write_report(session.config.run_dir)
        except Exception as error:
            session.log.say(f"{REPORT_FILE} is not written: {one_line(error)}; `r1p report` writes it again")
