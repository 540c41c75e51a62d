"""MoE-Adapters4CL (arXiv 2403.11549): experts beside the MLPs, a router for each task, the most used ones frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from r1p_dist.adapters import MergedWeight, Routing
from r1p_dist.adapters.low_rank import fill_uniform, full_values
from r1p_dist.adapters.recomputing import is_recomputing
from r1p_dist.config import Count, Positive, Probability, RunConfig, Section
from r1p_dist.distributed import gathered, sum_over_ranks
from r1p_dist.kinds import kind_of
from r1p_dist.protocol import FullMethod, Stage, Trainer

if TYPE_CHECKING:
    from r1p_dist.backbones.backbone import Batch
    from r1p_dist.data import Stream, Task

EXPERTS = ("down", "down_bias", "up", "up_bias")


class Experts(nn.Module):
    """scaling * sum over the best experts of a sample of gate * up(ReLU(down(x))), x (batch, tokens, width).

    The first token chooses: gates are the softmax of its `top` largest scores, in training with noise that is learnt.
    frozen: which experts are, (n,), and kept: their values (n, ...), which stand in for the parameters'.
    selected: the router in eval; None: nothing is added. pending: this rank's uses of a step, counts: all ranks'.
    """

    def __init__(self, width: int, options: MoeAdapters.Options, routing: Routing) -> None:
        super().__init__()
        count, size = options.experts, options.bottleneck
        self.down, self.down_bias = (
            nn.Parameter(torch.zeros(count, size, width)),
            nn.Parameter(torch.zeros(count, size)),
        )
        self.up, self.up_bias = nn.Parameter(torch.zeros(count, width, size)), nn.Parameter(torch.zeros(count, width))
        self.router, self.noise = (nn.Parameter(torch.zeros(width, count)) for _ in range(2))
        self.options, self.routing, self.width = options, routing, width
        self.frozen, self.kept = torch.zeros(0, dtype=torch.int64), dict[str, torch.Tensor]()
        self.counts, self.pending = (torch.zeros(count, dtype=torch.int64) for _ in range(2))
        self.selected: torch.Tensor | None = None
        self.is_recorded: bool | None = None  # False: the next forward counts

    def value(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """Returns the values of all experts: those that are frozen as they were then."""
        if not self.kept:
            return parameter
        return parameter.index_copy(0, self.frozen, self.kept[name].to(parameter.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        router = self.router if self.training else self.selected
        if router is None:
            return x.new_zeros(())
        first = x[:, 0]
        scores = first @ router.to(x.dtype)
        if self.training and self.options.noisy:
            spread = F.softplus(first @ self.noise) + 1e-2
            scores = scores + spread * torch.randn_like(scores)
        elif self.training:
            scores = scores + 0 * (first @ self.noise)  # every parameter has a gradient, at every ZeRO stage
        best, which = scores.topk(self.options.top, dim=1)
        if self.training:
            self._count(which)
        down, down_bias, up, up_bias = (self.value(name, getattr(self, name))[which] for name in EXPERTS)
        hidden = F.relu(torch.einsum("ntw,nkhw->nkth", x, down) + down_bias[:, :, None])
        hidden = F.dropout(hidden, self.options.dropout, self.training)
        found = torch.einsum("nkth,nkwh->nktw", hidden, up) + up_bias[:, :, None]
        gates = best.softmax(1).to(x.dtype)
        return self.options.scaling * (gates[:, :, None, None] * found).sum(1)

    @torch.no_grad()
    def _count(self, which: torch.Tensor) -> None:
        if self.is_recorded is not False or is_recomputing():
            return
        self.is_recorded = True
        times = self.routing.weights
        times = torch.ones(len(which), dtype=torch.int64, device=which.device) if times is None else times
        used = times[:, None].expand_as(which).flatten()
        self.pending = self.pending.to(which.device).index_add(0, which.flatten(), used)


class MoeAdapters(FullMethod):
    """MoE-Adapters: experts beside every MLP, of which a router per task takes two for each sample (arXiv 2403.11549).

    As the released code has it: the experts read the residual before the MLP's LayerNorm, the first token of a sample
    chooses, and after a task the experts that were used most are frozen. Its load-balancing loss is computed and never
    added, so there is none. It trains with no weight decay: set `train.weight_decay`. Its selector of tasks (DDAS),
    autoencoders on an AlexNet's features, is left out: the task's id chooses the router, and a task that was not
    trained gets the pretrained model. Without `task_ids` every task gets the last one's router.
    """

    paper = "arXiv 2403.11549"
    stores = "all experts, and a router of each task"
    inference = "task_id"
    tiny = {"experts": 6, "bottleneck": 4, "noisy": False, "dropout": 0.0}

    class Options(Section):
        """Options of MoE-Adapters."""

        experts: Count = 22
        """Beside each MLP."""
        top: Count = 2
        """Experts that a sample uses, and that are frozen after a task."""
        bottleneck: Count = 64
        """Width between an expert's two products."""
        scaling: Positive = 0.1
        """Of what the experts add."""
        dropout: Probability = 0.1
        """Rate of the dropout between an expert's products."""
        noisy: bool = True
        """Noise on the router's scores in training, which differs between ranks as dropout does."""
        task_ids: bool = True
        """Whether the task of each sample is known at inference."""

    options: Options

    @classmethod
    def check(cls, options: Section, config: RunConfig) -> None:
        if kind_of(config.backbone.kind).has_answers:
            raise ValueError(f"method={config.method}: only for CLIPs, got backbone.kind={config.backbone.kind}")

    def build(self) -> None:
        self._beside: dict[str, Experts] = self.backbone.put_beside(  # pyright: ignore[reportAttributeAccessIssue]
            lambda width, routing: Experts(width, self.options, routing), self.config.targets.towers
        )
        places = {id(parameter): name for name, parameter in self.backbone.named_parameters()}
        own = [parameter for module in self._beside.values() for parameter in module.parameters()]
        self._trained = {places[id(parameter)]: parameter for parameter in own}
        self._weights = {name: MergedWeight(parameter) for name, parameter in self._trained.items()}
        if not self.options.task_ids:
            self.inference = "routed"  # pyright: ignore[reportAttributeAccessIssue]

    def stages(self, stream: Stream) -> list[Stage]:
        stages = super().stages(stream)
        self._stage_of = {task.name: number for number, stage in enumerate(stages) for task in stage.tasks}
        return stages

    @torch.no_grad()
    def prepare(self, index: int) -> None:
        super().prepare(index)
        for number, module in enumerate(self._beside.values()):
            with gathered(module.parameters(), modify=True):
                if index == 0:
                    fill_uniform(module.down, module.width**-0.5, self.generator(number))
                module.router.zero_()
                module.noise.zero_()
            module.counts.zero_()

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        self._past = trainer.past_memory()
        device = self.backbone.device
        for name, module in self._beside.items() if self._past else ():
            known = self._past[-1]
            module.frozen = known[f"{name}.frozen"].long().to(device)
            module.kept = {part: known[f"{name}.{part}"].to(device) for part in EXPERTS}

    def loss(self, model: Callable, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        for module in self._beside.values():
            module.is_recorded = False
        return super().loss(model, batch)

    def after_step(self, trainer: Trainer) -> None:
        used = sum_over_ranks(torch.stack([module.pending for module in self._beside.values()]))
        for module, own in zip(self._beside.values(), used.cpu(), strict=True):
            module.counts += own
            module.pending = torch.zeros_like(module.counts)

    def end(self, stage: Stage, trainer: Trainer) -> None:
        self._memory = {}
        for name, module in self._beside.items():
            parts = (*EXPERTS, "router")
            values = dict(zip(parts, full_values(*(getattr(module, part) for part in parts)), strict=True))
            most_used = module.counts.argsort(descending=True, stable=True)[: self.options.top]
            frozen = torch.cat([module.frozen, most_used.to(module.frozen.device)]).unique()
            self._memory[f"{name}.frozen"], self._memory[f"{name}.router"] = frozen, values["router"]
            for part in EXPERTS:
                self._memory[f"{name}.{part}"] = module.value(part, values[part])[frozen.to(values[part].device)]

    def memory(self) -> dict[str, torch.Tensor]:
        return self._memory

    def state(self) -> dict[str, torch.Tensor]:
        return {f"{name}.counts": module.counts for name, module in self._beside.items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, module in self._beside.items():
            module.counts = state[f"{name}.counts"].clone()

    @contextmanager
    def select(self, task: Task) -> Iterator[None]:
        """A context with the router of a task, or with no experts where it was not trained yet."""
        number = self._stage_of[task.name] if self.options.task_ids else len(self._past)
        for name, module in self._beside.items():
            if number < len(self._past):
                module.selected = self._past[number][f"{name}.router"].to(self.backbone.device)
            elif number == len(self._past):
                (module.selected,) = full_values(module.router)
        yield
        for module in self._beside.values():
            module.selected = None
