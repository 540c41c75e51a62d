"""A run without its other ranks: rank 0 of any number makes real steps alone, and what they took is counted.

Everything is the code of a run: its weights, adapters, DeepSpeed engine, loader, loop, checkpoint, merge and
evaluation. Only the process group is a fake one, which sends nothing. So shapes, memory and collectives are those of a
run on that many ranks, and the numbers that it computes mean nothing.
"""

import logging
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from r1p_dist.backbones import Backbone, load_backbone
from r1p_dist.config import CheckpointConfig, LogConfig, RunConfig, TrainConfig
from r1p_dist.data import EvaluationLoader, Stream, Task, evaluation_loaders, train_loader
from r1p_dist.distributed import CollectiveCounter, fake_ranks, world_size
from r1p_dist.engine import TaskEngine, choose_precision, resolve_deepspeed, start_process_group, weights_placement
from r1p_dist.errors import InputError
from r1p_dist.evaluation.make import make_evaluator
from r1p_dist.interrupts import StepAgreement, Watchdog
from r1p_dist.methods import Stage, make_method
from r1p_dist.session import Session
from r1p_dist.storage_meter import StorageMeter
from r1p_dist.train import fit

# Under ZeRO-3 the first two steps of a task note and compare the order of modules; the third is like all others.
STEPS = 3
KINDS = ("weights", "gathered", "gradients", "optimizer", "exchanged", "activations")
# Who asks for memory: the innermost of these files on the stack says what it is for.
_OWNERS = (
    ("r1p_dist/adapters/pristine.py", "pristine"),
    ("r1p_dist/distributed.py", "exchanged"),
    ("torch/nn/modules/module.py", "activations"),  # the forward and the backward, which DeepSpeed calls
    ("torch/autograd/graph.py", "activations"),
    ("torch/optim/", "optimizer"),
    ("deepspeed/runtime/zero/partition", "gathered"),
    ("deepspeed/runtime/", "gradients"),
)
_COLLECTIVES = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all", "broadcast", "barrier", "reduce")


@dataclass(frozen=True)
class Phase:
    """What a part of a run took. memory: bytes by kind at the moment of the highest sum, and that as `total`.

    allocator: the highest bytes that the accelerator's allocator handed out, None on a CPU. collectives: kind -> calls
    and bytes, those of the whole tensors.
    """

    memory: dict[str, int]
    allocator: int | None
    collectives: dict[str, dict[str, int]]


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
            "precision": choose_precision(config)[0],
            "device": self.device,
            "global_batch_size": config.train.global_batch_size,
            "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
            "batch": self.batch,
            "phases": {
                name: {"memory": phase.memory, "allocator": phase.allocator, "collectives": phase.collectives}
                for name, phase in self.phases.items()
            },
        }


def set_ranks(config: RunConfig, ranks: int, batch: int | None) -> RunConfig:
    """Returns the configuration for so many ranks. batch: samples of each in a micro step; None: as the recipe has it.

    InputError: numbers below 1, or a global batch that does not divide.
    """
    for flag, value in (("--ranks", ranks), ("--batch", batch)):
        if value is not None and value < 1:
            raise InputError(f"{flag} {value}: must be from 1")
    micro_steps, size = config.train.gradient_accumulation_steps, config.train.global_batch_size
    if batch is not None:
        size = ranks * batch * micro_steps
    if size % (ranks * micro_steps):
        raise InputError(
            f"--ranks {ranks}: train.global_batch_size={size} does not divide into {ranks} ranks times "
            f"train.gradient_accumulation_steps={micro_steps}; give --batch N, the samples of each rank in a micro "
            f"step, or a multiple of {ranks * micro_steps}"
        )
    return config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": size})})


def dry_run(config: RunConfig, ranks: int) -> DryRun:
    """Runs as rank 0 of so many and returns what that took; nothing is written but temporary files.

    InputError: as in training, or a method that trains nothing.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="r1p-dry-run-") as folder, fake_ranks(ranks):
        own = {"run_dir": Path(folder), "resume": "never"}
        own |= {"checkpoint": CheckpointConfig(every_steps=None), "log": LogConfig(every_steps=STEPS)}
        return _rank_0(config.model_copy(update=own))


def _rank_0(config: RunConfig) -> DryRun:
    device = start_process_group()
    torch.manual_seed(config.seed)
    stream = Stream.load(config.stream, config.order, config.tasks)
    stream.check_names(config.train.per_task, "train.per_task")
    with _Probe(device) as probe:
        backbone = load_backbone(config.backbone, weights_placement(config, device))
        backbone.check(stream)
        method = make_method(config, backbone)
        if not method.adapters:
            raise InputError(f"method={config.method}: trains nothing, so there is no step to run; use dac or lora")
        probe.settle(backbone)
        stage = replace(method.stages(stream)[0], iterations=STEPS)
        reference = Stream.load(config.data.reference).tasks if config.data.reference else ()
        encoder = backbone.encoder(config.data)
        loader = train_loader(config, stage.tasks, STEPS, encoder, reference=reference)
        session = Session(config, method, [stage], {})
        session.log.is_silent = True
        watchdog = Watchdog(math.inf, config.run_dir)
        train = config.train.for_task(stage.name).model_copy(update={"iterations": STEPS})
        make_engine = partial(_ObservedEngine, backbone, config, train, world_size(), probe)
        try:
            running = session.open_stage(0, loader, make_engine)
            probe.cut("loading")
            fit(running, session, StepAgreement(device), watchdog)
            batch = _describe_batch(backbone, loader.micro_batch_size)
            probe.drop()
            session.save_step(running)
            session.checkpoints.wait()
            probe.cut("save")
            for adapter, updates in zip(method.adapters, method.unmerged_updates(), strict=True):
                adapter.set_weight(updates)
            method.end_task()
            probe.cut("merge")
            _evaluate(config, backbone, running.model, stage)
            probe.cut("evaluation")
            running.model.close()
            method.begin_task(1)
            make_engine().close()
            probe.cut("next task")
        finally:
            watchdog.stop()
            session.close()
    phases = probe.phases
    phases["boundary"] = _joined(phases.pop("merge"), phases.pop("next task"))
    return DryRun(config, world_size(), device.type, batch, phases)


class _ObservedEngine(TaskEngine):
    """Tells the probe when it is ready, and at the end of every step."""

    def __init__(self, backbone: nn.Module, config: RunConfig, train: TrainConfig, world_size: int, probe: "_Probe"):
        super().__init__(backbone, config, train, world_size)
        self._probe = probe
        probe.settle(backbone, self)

    def step(self, loss: torch.Tensor) -> bool:
        is_boundary = super().step(loss)
        if is_boundary:
            self._probe.settle(self.engine.module, self)
            self._probe.cut("step")
        return is_boundary


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


class _Probe:
    """Counts memory and collectives, and cuts the run into phases; a phase that comes again replaces the one before."""

    def __init__(self, device: torch.device) -> None:
        self.phases: dict[str, Phase] = {}
        self._meter, self._counter = _KindMeter(device), CollectiveCounter()
        self._has_allocator = device.type != "cpu"

    def __enter__(self) -> "_Probe":
        self._counter.__enter__()
        self._meter.__enter__()
        self.drop()
        return self

    def __exit__(self, *exception: object) -> None:
        self._meter.__exit__(*exception)
        self._counter.__exit__(*exception)

    def settle(self, model: nn.Module, engine: TaskEngine | None = None) -> None:
        """Finds the weights and the optimizer's state, whoever made them."""
        self._meter.assign("weights", [*_kept_parameters(model), *model.buffers()])
        if engine is not None:
            self._meter.assign("optimizer", _optimizer_state(engine))
        self._meter.default = "activations"

    def cut(self, name: str) -> None:
        """Ends a phase here."""
        memory = {kind: self._meter.highest[kind] for kind in KINDS}
        memory["total"] = sum(memory.values())
        allocator = torch.accelerator.max_memory_allocated() if self._has_allocator else None
        self.phases[name] = Phase(memory, allocator, _by_kind(self._counter.summary()))
        self.drop()

    def drop(self) -> None:
        """Begins a phase here and forgets what was since the last one."""
        self._meter.begin()
        self._counter.calls.clear()
        self._counter.bytes.clear()
        if self._has_allocator:
            torch.accelerator.reset_peak_memory_stats()


class _KindMeter(StorageMeter):
    """Knows for every storage on the device what it is for. highest: bytes by kind at the highest sum of a phase."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.default = "weights"  # until they are there
        self.highest: Counter[str] = Counter()
        self._type = device.type
        self._kinds: dict[int, str] = {}
        self._bytes: Counter[str] = Counter()

    def begin(self) -> None:
        self.take_peak()
        self.highest = self._bytes.copy()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.see(output)
        return output

    def is_counted(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._type

    def grow(self, key: int, size: int) -> None:
        kind = self._kinds[key] = self._kind()
        self._bytes[kind] += size
        if kind != "pristine":  # in a file
            peak = self._peak
            super().grow(key, size)
            if self._peak > peak:
                self.highest = self._bytes.copy()

    def shrink(self, key: int, size: int) -> None:
        kind = self._kinds.pop(key)
        self._bytes[kind] -= size
        if kind != "pristine":
            super().shrink(key, size)

    def assign(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """Says what these are for."""
        for tensor in tensors:
            if self.is_counted(tensor):
                self.see(tensor)
                storage = tensor.untyped_storage()
                before, self._kinds[storage._cdata] = self._kinds[storage._cdata], kind
                self._bytes[before] -= storage.nbytes()
                self._bytes[kind] += storage.nbytes()

    def _kind(self) -> str:
        frame = sys._getframe(1)
        while frame is not None:
            for path, kind in _OWNERS:
                if path in frame.f_code.co_filename and frame.f_code.co_name != "__torch_dispatch__":
                    return self.default if kind == "activations" else kind
            frame = frame.f_back
        return self.default


def _kept_parameters(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yields what this rank keeps of each parameter: its part under ZeRO-3."""
    for parameter in model.parameters():
        yield parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter.data


def _optimizer_state(engine: TaskEngine) -> Iterator[torch.Tensor]:
    """Yields the moments and, where it is another tensor than the parameter itself, the fp32 value."""
    outer = engine.engine.optimizer
    own = {parameter.untyped_storage()._cdata for parameter in _kept_parameters(engine.engine.module)}
    for value, state in getattr(outer, "optimizer", outer).state.items():
        if value.untyped_storage()._cdata not in own:
            yield value.data
        yield from (tensor for tensor in state.values() if tensor.dim())


def _by_kind(summary: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Returns the counts under the usual names: `allgather` and `allgather_base` are both all_gather."""
    found: dict[str, Counter[str]] = {}
    for name, counts in summary.items():
        plain = name.replace("_", "")
        kind = next((kind for kind in _COLLECTIVES if plain.startswith(kind.replace("_", ""))), name)
        found.setdefault(kind, Counter()).update(counts)
    return {kind: dict(counts) for kind, counts in sorted(found.items())}


def _joined(first: Phase, second: Phase) -> Phase:
    """Returns two phases as one: the higher memory, and all collectives."""
    higher = max(first, second, key=lambda phase: phase.memory["total"])
    collectives: dict[str, Counter[str]] = {}
    for phase in (first, second):
        for kind, counts in phase.collectives.items():
            collectives.setdefault(kind, Counter()).update(counts)
    allocator = None if first.allocator is None else max(first.allocator, second.allocator)
    return Phase(higher.memory, allocator, {kind: dict(counts) for kind, counts in sorted(collectives.items())})
