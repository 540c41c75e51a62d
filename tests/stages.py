"""The stages of a method without a run around them: no data, no folder, no evaluation."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from r1p_dist.config import RunConfig
from r1p_dist.distributed import world_size
from r1p_dist.engine import TaskEngine
from r1p_dist.interrupts import StepAgreement
from r1p_dist.protocol import Method, Stage
from r1p_dist.step_meter import StepMeter
from r1p_dist.trainer import TaskTrainer


class Stages:
    """Begins and ends one stage after another, in the loop's order; what finished ones left stays in memory."""

    shares_memory = True  # by a collective that a run does not have

    def __init__(
        self, method: Method, config: RunConfig, scan_loader: Callable[[int | None], Any] | None = None
    ) -> None:
        self.method, self.config, self.scan_loader = method, config, scan_loader
        self.updates: list[dict] = []
        self.memory: list[dict] = []

    def begin(self, index: int, tasks: tuple = (), engine: type[TaskEngine] = TaskEngine) -> TaskTrainer:
        self.index = index
        self.deploy(self.method.merged(index))
        self.method.prepare(index)
        self.agreement = StepAgreement(torch.device("cpu"))
        self.stage = Stage(f"task {index}", tasks, self.config.train.iterations)
        train, exchange = self.config.train, self.agreement.exchange
        self.engine = engine(self.method.backbone, self.config, train, world_size(), exchange)
        self.meter = StepMeter(torch.device("cpu"))
        self.trainer = TaskTrainer(
            self.method, self.engine, self.agreement, self.meter, self.scan_loader, self.memory[:index]
        )
        self.method.begin(self.stage, self.trainer)
        self.method.backbone.train()
        return self.trainer

    def end(self) -> None:
        with self.method.before_merge():
            pass
        self.method.end(self.stage, self.trainer)
        self.updates.append(self.method.updates())
        memory = self.method.memory()
        self.memory.append(of_all_ranks(memory) if self.shares_memory else memory)
        self.deploy(self.method.deployed(len(self.updates)))

    def deploy(self, stages: list[int]) -> None:
        held = self.method.set_merged([self.updates[index] for index in stages])
        for index, updates in zip(stages, held, strict=True):
            self.updates[index] = updates


def of_all_ranks(memory: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns what any rank gives, as a run's folder has it."""
    if world_size() == 1:
        return memory
    found: list[dict[str, torch.Tensor]] = [{}] * world_size()
    dist.all_gather_object(found, memory)
    return {name: tensor for given in reversed(found) for name, tensor in given.items()}
