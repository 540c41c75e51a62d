"""The protocol between the training loop and a method: the loop knows this and stages, never a method by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from r1p_dist.adapters import LowRankLinear, Update, recorded
from r1p_dist.config import RunConfig, Section, TrainConfig
from r1p_dist.protocol.boundary import BoundaryPlan

if TYPE_CHECKING:  # methods are imported to check their options, which shall not take all of open_clip
    from r1p_dist.backbones import Backbone
    from r1p_dist.backbones.backbone import Batch
    from r1p_dist.data import Stream, Task
    from r1p_dist.protocol.trainer import Trainer


@dataclass(frozen=True)
class Stage:
    """What is trained at once: one task of the stream, or several together."""

    name: str
    tasks: tuple[Task, ...]
    iterations: int


@dataclass(frozen=True)
class DataRequest:
    """A stream of batches beside the stage's own: of these tasks, with as many samples per step as a step has.

    kept: how many samples of each class, or of each task of conversations; None: those that a task trains on.
    """

    tasks: tuple[Task, ...]
    kept: int | None = None


class NoOptions(Section):
    """No options."""


class Method:
    """One way to learn a stream of tasks; it puts its modules on the backbone when it is made (`build`).

    For each stage the loop calls prepare -> (the engine is made) -> begin -> step … step -> before_merge -> end. After
    a resume the same calls come in the same order with the same weights, and then the numbers are put back.

    paper: the source. Options: what `options:` of a recipe may have. trains: whether there is anything to train.
    stores: what it keeps beside the model, in words. inference: what a deployed model needs: nothing more than merged
    weights, the number of the task, or a router. columns: numbers beside value and moments, one per trained number,
    kept and saved like them. tiny: options with which the conformance suite runs it.
    """

    paper: ClassVar[str] = ""
    Options: ClassVar[type[Section]] = NoOptions
    trains: ClassVar[bool] = True
    stores: ClassVar[str] = "nothing"
    inference: ClassVar[Literal["merged", "task_id", "routed"]] = "merged"
    columns: ClassVar[tuple[str, ...]] = ()
    tiny: ClassVar[dict] = {}

    def __init__(self, config: RunConfig, backbone: Backbone):
        self.config, self.backbone = config, backbone
        self.options = self.Options.model_validate(config.options)
        self.adapters: list[LowRankLinear] = []
        self.build()

    @classmethod
    def check(cls, options: Section, config: RunConfig) -> None:
        """Raises ValueError or InputError where the options do not fit the rest of a configuration."""

    def build(self) -> None:
        """Puts the method's modules on the backbone; requires_grad says what is trained."""

    def stages(self, stream: Stream) -> list[Stage]:
        """Returns what is trained, in order: one stage per task unless the method says otherwise."""
        train = self.config.train
        return [Stage(task.name, (task,), train.for_task(task.name).iterations) for task in stream.tasks]

    def further_data(self, stage: Stage, past: Sequence[Task]) -> dict[str, DataRequest]:
        """Returns the streams that a stage needs beside its own; past: the tasks that were trained before."""
        return {}

    def prepare(self, index: int) -> None:
        """Sets the parameters that stage `index` begins with, before its engine is made: fresh adapters, by default."""
        for number, adapter in enumerate(self.adapters):
            adapter.reset(self.generator(index, number))

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        """Scans data, sets frozen factors, takes snapshots, before the first step."""

    def losses(self, model: Callable, batch: Batch) -> dict[str, torch.Tensor]:
        """Returns the named terms of a micro batch's loss; their sum, with the layers' own penalties, is the loss.

        model: the backbone in its engine. Every term is this rank's part: the mean over ranks is the global one.
        """
        return {"data": self.backbone.loss(model, batch)}

    def loss(self, model: Callable, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the loss of one micro batch and its terms, detached: those of `losses` and the layers' penalties."""
        with recorded(self.adapters) as penalties:
            terms = self.losses(model, batch)
        terms = terms | penalties
        loss = (
            torch.stack([term.float() for term in terms.values()]).sum()
            if len(terms) > 1
            else next(iter(terms.values()))
        )
        return loss, {name: term.detach() for name, term in terms.items()}

    def step(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        """Makes one optimizer step of its micro batches."""
        for batch in batches:
            trainer.backward(batch)
        trainer.update()

    def after_step(self, trainer: Trainer) -> None:
        """Called after each optimizer step."""

    def trained(self) -> dict[str, Update]:
        """Returns all that the stage trained on adapters, by layer, where `updates` leaves less or something else."""
        return self.updates()

    @contextmanager
    def before_merge(self) -> Iterator[None]:
        """A context in which merged weights alone make the model with all that was trained."""
        trained = self.trained()
        for adapter in self.adapters:
            # those of an adapter are Factors
            adapter.set_weight([*adapter.merged, trained[adapter.name]])  # pyright: ignore[reportArgumentType]
        try:
            yield
        finally:
            for adapter in self.adapters:
                adapter.set_weight(adapter.merged)

    def end(self, stage: Stage, trainer: Trainer) -> None:
        """Consolidates what the stage learnt, before its updates are taken; weights are as in training."""

    def updates(self) -> dict[str, Update]:
        """Returns what the stage leaves, by layer; written to the run's folder, and merged where it is deployed."""
        return {}

    def memory(self) -> dict[str, torch.Tensor]:
        """Returns what later stages need to know of this one, by name; kept in the run's folder.

        A tensor that several ranks give is equal on them; what is large is given by the rank that owns the layer.
        """
        return {}

    def merged(self, index: int) -> list[int]:
        """Returns the stages whose updates are in the weights while stage `index` trains."""
        return self.deployed(index)

    def deployed(self, count: int) -> list[int]:
        """Returns the stages whose updates make up the model after `count` stages."""
        return list(range(count))

    @property
    def tasks_add_up(self) -> bool:
        """Whether the model is W_0 plus a sum over tasks, so that one can be taken out."""
        return self.deployed(2) == [0, 1]

    def select(self, task: Task) -> AbstractContextManager:
        """Returns a context in which the model is the one for this task, where inference needs to know it."""
        return nullcontext()

    def set_merged(self, updates: Sequence[Mapping[str, Update]]) -> Sequence[Mapping[str, Update]]:
        """Makes these updates, in order, all that is merged into the weights: W_0 and nothing else where none.

        Returns them as the layers hold them, so that nobody need keep the numbers twice.
        """
        for adapter in self.adapters:
            # those of an adapter are Factors
            adapter.set_merged([task[adapter.name] for task in updates])  # pyright: ignore[reportArgumentType]
        return [{adapter.name: adapter.merged[i] for adapter in self.adapters} for i in range(len(updates))]

    def update_places(self) -> dict[str, tuple[nn.Parameter, slice | None]]:
        """Returns of each layer in `updates` the weight that it changes, and the rows of it; None: all."""
        # torch declares the weight of a Linear as a tensor
        places = {adapter.name: (adapter.linear.weight, adapter.rows) for adapter in self.adapters}
        return places  # pyright: ignore[reportReturnType]

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Returns what a stage trains: of adapters by layer and name, of the backbone by its own names."""
        own = {
            f"{adapter.name}.{name}": parameter
            for adapter in self.adapters
            for name, parameter in adapter.trainable_parameters().items()
        }
        known = set(own.values())
        others = {
            name: parameter
            for name, parameter in self.backbone.named_parameters()
            if parameter.requires_grad and parameter not in known
        }
        return own | others

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what a stage in progress has beside its parameters; equal on every rank."""
        return {f"{adapter.name}.{key}": value for adapter in self.adapters for key, value in adapter.state().items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `state` returned."""
        for adapter in self.adapters:
            adapter.load_state({key: state[f"{adapter.name}.{key}"] for key in adapter.state()})

    def count_parameters(self) -> int:
        """Returns how many numbers one task trains, also where ZeRO-3 shards them."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.trainable_parameters().values())

    def plan_boundary(self) -> BoundaryPlan:
        """Returns what the planner must know of what is done between two stages, beside what any method does there."""
        return BoundaryPlan()

    def plan_past(self) -> list[torch.Tensor]:
        """Gives the layers what they know of past stages in a later one, on the meta device; returns these tensors.

        The planner then traces a step of such a stage, and every rank keeps the tensors in it.
        """
        return []

    def train_config(self, stage: Stage) -> TrainConfig:
        """Returns the values that a stage trains with."""
        return self.config.train.for_task(stage.name).model_copy(update={"iterations": stage.iterations})

    def generator(self, *key: int) -> torch.Generator:
        """Returns a generator for the run's seed and the key, the same on every rank."""
        digest = hashlib.sha256(repr((self.config.seed, key)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
