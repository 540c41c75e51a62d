"""A run without its other ranks: rank 0 of any number makes real steps alone, and what they took is counted.

Everything is the code of a run: its weights, adapters, DeepSpeed engine, loader, loop, checkpoint, merge and
evaluation. Only the process group is a fake one, which sends nothing. So shapes, memory and collectives are those of a
run on that many ranks, and the numbers that it computes mean nothing.
"""

import logging
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from r1p_dist.backbones import Backbone, load_backbone
from r1p_dist.config import CheckpointConfig, LogConfig, RunConfig, TrainConfig
from r1p_dist.data import EvaluationLoader, Stream, evaluation_loaders
from r1p_dist.distributed import fake_ranks, world_size
from r1p_dist.dry_run.probe import Phase, Probe, joined
from r1p_dist.engine import TaskEngine, resolve_deepspeed, start_process_group, weights_placement
from r1p_dist.errors import InputError
from r1p_dist.evaluation.make import make_evaluator
from r1p_dist.fit import fit
from r1p_dist.interrupts import StepAgreement, Watchdog
from r1p_dist.methods import make_method
from r1p_dist.precision import choose_precision
from r1p_dist.protocol import Stage
from r1p_dist.session import Session
from r1p_dist.stage_data import stage_data

# Under ZeRO-3 the first two steps of a task note and compare the order of modules; the third is like all others.
STEPS = 3


@dataclass(frozen=True)
class DryRun:
    """The result. batch: samples of a rank in a micro step, the distinct texts among them, tokens of the longest.

    phases: loading, step (the third), save, boundary (merge and the next task's engine) and evaluation (one batch).
    """

    config: RunConfig
    ranks: int
    device: str
    batch: dict[str, int]
    phases: dict[str, Phase]

    def as_json(self) -> dict[str, Any]:
        config = self.config
        return {
            "ranks": self.ranks,
            "method": config.method,
            "model": config.backbone.name,
            "zero_stage": resolve_deepspeed(config, self.ranks)["zero_optimization"]["stage"],
            "precision": choose_precision(config.train.precision)[0],
            "device": self.device,
            "global_batch_size": config.train.global_batch_size,
            "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
            "batch": self.batch,
            "phases": {
                name: {"memory": phase.memory, "allocator": phase.allocator, "collectives": phase.collectives}
                for name, phase in self.phases.items()
            },
        }


def dry_run(config: RunConfig, ranks: int) -> DryRun:
    """Runs as rank 0 of so many and returns what that took; nothing is written but temporary files.

    InputError: as in training, or a method that trains nothing.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="r1p-dry-run-") as folder, fake_ranks(ranks):
        own = {"run_dir": Path(folder), "resume": "never"}
        own |= {"backbone": config.backbone.model_copy(update={"feature_cache_dir": None})}
        own |= {"checkpoint": CheckpointConfig(every_steps=None), "log": LogConfig(every_steps=STEPS)}
        return _rank_0(config.model_copy(update=own))


def _rank_0(config: RunConfig) -> DryRun:
    device = start_process_group()
    torch.manual_seed(config.seed)
    stream = Stream.load(config.stream, config.order, config.tasks)
    stream.check_names(config.train.per_task, "train.per_task")
    with Probe(device) as probe:
        backbone = load_backbone(config.backbone, weights_placement(config, device), config.train.compile)
        backbone.check(stream)
        method = make_method(config, backbone)
        if not method.trains:
            raise InputError(f"method={config.method}: trains nothing, so there is no step to run; use dac or lora")
        probe.settle(backbone)
        stage = replace(method.stages(stream)[0], iterations=STEPS)
        reference = Stream.load(config.data.reference).tasks if config.data.reference else ()
        encoder = backbone.encoder(config.data)
        data = stage_data(config, method, [stage], 0, encoder, reference)
        scan = data.scan
        data = replace(data, scan=lambda batches: scan(min(batches or STEPS, STEPS)))  # as short as the dry run
        session = Session(config, method, [stage], {})
        session.log.is_silent = True
        watchdog = Watchdog(math.inf, config.run_dir)
        train = method.train_config(stage)
        agreement = StepAgreement(device)
        agreement.close()  # there is nothing to save before a signal ends this
        make_engine = partial(_ObservedEngine, backbone, config, train, agreement, probe)
        try:
            running = session.open_stage(0, data, make_engine, agreement)
            probe.cut("loading")
            fit(running, session, agreement, watchdog)
            batch = _describe_batch(backbone, data.train.micro_batch_size)
            probe.drop()
            session.save_step(running)
            session.checkpoints.wait()
            probe.cut("save")
            with method.before_merge():
                pass
            method.end(stage, running.trainer)
            session.finish_stage(0)
            probe.cut("merge")
            _evaluate(config, backbone, running.model, stage)
            probe.cut("evaluation")
            running.model.close()
            method.prepare(1)
            make_engine().close()
            probe.cut("next task")
        finally:
            watchdog.stop()
            session.close()
    phases = probe.phases
    phases["boundary"] = joined(phases.pop("merge"), phases.pop("next task"))
    return DryRun(config, world_size(), device.type, batch, phases)


class _ObservedEngine(TaskEngine):
    """Tells the probe when it is ready, and at the end of every step."""

    def __init__(
        self, backbone: nn.Module, config: RunConfig, train: TrainConfig, agreement: StepAgreement, probe: Probe
    ):
        super().__init__(backbone, config, train, world_size(), agreement.exchange)
        self._probe = probe
        probe.settle(backbone, self)

    def update(self) -> None:
        super().update()
        self._probe.settle(self.engine.module, self)
        self._probe.cut("step")


def _evaluate(config: RunConfig, backbone: Backbone, model: TaskEngine, stage: Stage) -> None:
    """Evaluates one batch of the first task, with no more prompts than one forward takes."""
    task, most = stage.tasks[0], config.evaluation.batch_size
    templates = task.templates[:most]
    names = task.class_names[: max(1, most // max(1, len(templates)))]
    loaders = evaluation_loaders(config, [task], backbone.encoder(config.data))
    loaders = {name: _FirstBatch(loader) for name, loader in loaders.items()}
    task = replace(task, class_names=names, templates=templates)
    make_evaluator(config.evaluation, backbone, loaders).evaluate(model, [task])


class _FirstBatch:
    """An evaluation loader that ends after its first batch."""

    def __init__(self, loader: EvaluationLoader) -> None:
        self.dataset, self._loader = loader.dataset, loader

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return islice(iter(self._loader), 1)


def _describe_batch(backbone: Backbone, samples: int) -> dict[str, int]:
    routing = backbone.routing["text" if "text" in backbone.routing else "language"]
    texts, tokens = routing.padding.shape
    return {"samples": samples, "texts": texts, "tokens": tokens}
