"""The protocol between the training loop and a method: the loop knows this and tasks, never a method by name."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from r1p_dist.adapters import Factors, LowRankLinear
from r1p_dist.backbones import Backbone
from r1p_dist.config import RunConfig
from r1p_dist.data import Stream, Task


@dataclass(frozen=True)
class Stage:
    """What is trained at once: one task of the stream, or several together."""

    name: str
    tasks: tuple[Task, ...]
    iterations: int


class Method:
    """One way to learn a stream of tasks. A method puts its adapters on the backbone when it is made.

    sections: of the configuration, those that not every method reads.
    """

    sections: tuple[str, ...] = ()

    def __init__(self, config: RunConfig, backbone: Backbone):
        self.config, self.backbone = config, backbone
        self.adapters: list[LowRankLinear] = self.attach()

    def attach(self) -> list[LowRankLinear]:
        """Puts the method's adapters on the backbone and returns them; none for a method that does not train."""
        raise NotImplementedError

    def stages(self, stream: Stream) -> list[Stage]:
        """Returns what is trained, in order: one stage per task unless the method says otherwise."""
        train = self.config.train
        return [Stage(task.name, (task,), train.for_task(task.name).iterations) for task in stream.tasks]

    def begin_task(self, index: int) -> None:
        """Prepares the adapters for stage `index`, before its optimizer is made."""

    def loss(self, model: Callable, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the loss of one micro batch and what else to log. model: the backbone in its DeepSpeed engine."""
        return self.backbone.loss(model, batch), {}

    def end_step(self) -> None:
        """Called after each optimizer step."""

    def unmerged_updates(self) -> list[list]:
        """Returns per adapter the updates that make up the model of this task before its merge."""
        raise NotImplementedError

    def end_task(self) -> None:
        """Merges what the stage learnt into the frozen weights."""

    def merged_tasks(self, index: int) -> list[int]:
        """Returns the stages whose updates are in the weights while stage `index` trains."""
        return list(range(index))

    def deployed_tasks(self, count: int) -> list[int]:
        """Returns the stages whose updates make up the model after `count` stages."""
        return list(range(count))

    def restore_merged(self, updates: list[list[Factors]]) -> None:
        """Puts back what finished tasks merged: per task, the update of each adapter."""
        for i, adapter in enumerate(self.adapters):
            adapter.set_merged([task[i] for task in updates])

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Returns what a stage trains, by layer and name."""
        return {
            f"{adapter.name}.{name}": parameter
            for adapter in self.adapters
            for name, parameter in adapter.trainable_parameters().items()
        }

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what a stage in progress has beside its parameters; equal on every rank."""
        return {f"{adapter.name}.{key}": value for adapter in self.adapters for key, value in adapter.state().items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Takes back what `state` returned."""
        for adapter in self.adapters:
            adapter.load_state({key: state[f"{adapter.name}.{key}"] for key in adapter.state()})

    def count_parameters(self) -> int:
        """Returns how many numbers one task trains, also where ZeRO-3 shards them."""
        parameters = [parameter for adapter in self.adapters for parameter in adapter.parameters()]
        return sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)

    def generator(self, *key: int) -> torch.Generator:
        """Returns a generator for the run's seed and the key, the same on every rank."""
        digest = hashlib.sha256(repr((self.config.seed, key)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
