"""Pools of rank-1 experts in one's own loop: DAC on a model that its user trains, evaluates and deploys.

What is trained is the method `dac` itself, as a run has it (methods/dac.py); here is the order of its calls, and what
goes wrong silently in another order is refused.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from r1p_dist.adapters import LowRankLinear, take_penalties
from r1p_dist.adapters.pool import share_votes
from r1p_dist.backbones.host import Host
from r1p_dist.backbones.hosts import find_host
from r1p_dist.checkpoint.adapters import TensorFile, tensors_of, updates_in, write_tensors
from r1p_dist.config import RunConfig, TargetsConfig
from r1p_dist.distributed import agree
from r1p_dist.errors import InputError
from r1p_dist.key_words import nearest_name
from r1p_dist.methods.dac import Dac, GuideOptions

Guide = Literal["auto", "first", "eot", "mean", "last_prompt", "cls_image"]
_FACTS = "r1p_dist.attached_pool"  # where a file's facts stand


class AttachedPool:
    """Pools of rank-1 experts on the linears of a model, through a stream of tasks in one's own loop.

    For each task, in order: `begin_task`; steps, each with the model's loss plus `penalty()` and an `end_step()` at its
    end; `trained()` to evaluate all that was trained, if wanted; `merge`. Training and evaluation mode follow by
    themselves: `model.train()` where no task is open and `model.eval()` where one is not merged yet are errors. Where
    there is a process group all calls are made on every rank, and votes are summed over ranks.

    model: as it was given, frozen. adapters: one per linear, by tower and block. task: the open one, or None.
    merged_tasks: those whose experts are in the weights.
    """

    def __init__(self, host: Host, method: "AttachedDac"):
        self.model, self.adapters = host.model, method.adapters
        self.task: int | None = None
        self._host, self._method = host, method
        self._begun = 0
        self._merged: list[int] = []
        self._memories: dict[int, dict[str, torch.Tensor]] = {}
        self._is_shown = self._is_detached = False
        self.model.train = self._set_mode
        self._switch(self.model.training)  # adapters take the mode of the model
        own = {id(buffer) for adapter in self.adapters for buffer in adapter.buffers()}
        # DistributedDataParallel would give all ranks the first one's votes of a step that is not at its end
        names = [name for name, buffer in self.model.named_buffers() if id(buffer) in own]
        self.model._ddp_params_and_buffers_to_ignore = names

    @property
    def merged_tasks(self) -> tuple[int, ...]:
        return tuple(self._merged)

    def parameters(self) -> list[nn.Parameter]:
        """Returns what a task trains: A (rank, in) and B (out, rank) of each pool, and routers that learn."""
        return [parameter for adapter in self.adapters for parameter in adapter.trainable_parameters().values()]

    def begin_task(self, task: int) -> None:
        """Begins a task with fresh experts, drawn by seed and task as a run draws them, in training mode.

        task: 0, 1, …; make a new optimizer for it. InputError: another task is open, or another one is next.
        """
        self._need_attached("begin_task()")
        if self.task is not None:
            raise InputError(f"begin_task({task}): task {self.task} is open; call pool.merge() first")
        if task != self._begun:
            raise InputError(f"begin_task({task}): tasks are begun one after another; the next one is {self._begun}")
        self._method.prepare(task)
        self._method.set_past(list(self._memories.values()))
        take_penalties(self.adapters)
        self.task, self._begun = task, task + 1
        self._switch(True)

    def penalty(self) -> torch.Tensor:
        """Returns what is to be added to the loss of the forward just made: the AGO term with its weight, ().

        Once per micro batch; zero in the first task. InputError: no task is open, or there was no training forward.
        """
        self._need_open("penalty()")
        terms = take_penalties(self.adapters)
        if terms:
            return torch.stack(list(terms.values())).sum()
        if any(adapter.orthogonal_to is not None for adapter in self.adapters):
            raise InputError("penalty(): the model made no training forward since the last call; call it once for each")
        return torch.zeros((), device=self.adapters[0].B.device)

    def end_step(self) -> None:
        """Ends an optimizer step: the votes of `lagged` and `local` are summed over ranks. A collective for these."""
        self._need_open("end_step()")
        share_votes(self.adapters)

    @contextmanager
    def trained(self) -> Iterator[nn.Module]:
        """A context in which the model is in evaluation mode with all that the task has trained so far in its weights.

        That is more than `merge` leaves: all active experts, not the merged ones alone.
        """
        self._need_open("trained()")
        if self._is_shown:
            raise InputError("trained(): is entered already")
        with self._method.before_merge():
            self._is_shown = True
            self._switch(False)
            try:
                yield self.model
            finally:
                self._is_shown = False
                self._switch(True)

    def merge(self) -> None:
        """Ends a task: merges its most counted experts into the weights; the model is in evaluation mode then.

        InputError: no task is open, or it was not trained.
        """
        self._need_open("merge()")
        assert self.task is not None
        if self._is_shown:
            raise InputError("merge(): inside `with pool.trained():`; leave it first")
        if any(adapter.pending_votes.any() for adapter in self.adapters):
            raise InputError("merge(): votes of the last step are not counted; call pool.end_step() after every step")
        if not any(adapter.activation_counts.any() for adapter in self.adapters):
            raise InputError(f"merge(): task {self.task} made no training step, so no expert has a vote")
        if memory := self._method.memory():
            self._memories[self.task] = memory
        updates = self._method.updates()
        for adapter in self.adapters:
            adapter.merge_update(updates[adapter.name])
        self._merged.append(self.task)
        self.task = None
        self._switch(False)

    def unmerge(self, task: int) -> None:
        """Takes a merged task out of the weights again; the others stay as they are.

        InputError: it is not merged, or a task is open.
        """
        self._need_attached("unmerge()")
        if self.task is not None:
            raise InputError(f"unmerge({task}): task {self.task} is open; call pool.merge() first")
        if task not in self._merged:
            known = ", ".join(map(str, self._merged)) or "none"
            raise InputError(f"unmerge({task}): that task is not merged; merged are {known}")
        for adapter in self.adapters:
            adapter.unmerge(self._merged.index(task))
        self._merged.remove(task)
        self._memories.pop(task, None)

    def detach(self) -> nn.Module:
        """Returns the plain model with its own modules and keys, and all that was merged in its weights.

        Of what `load_clip` or `load_llava` gave, the library's model in it. InputError: a task is open.
        """
        self._need_attached("detach()")
        if self.task is not None:
            raise InputError(f"detach(): task {self.task} is not merged; call pool.merge() first")
        del self.model.train, self.model._ddp_params_and_buffers_to_ignore
        self._is_detached = True
        plain = self._host.close()
        if plain is not self.model:
            self.model.is_emptied = True
        return plain

    def save(self, path: str | Path) -> None:
        """Writes what was merged, and the task in progress at the end of a step, to one safetensors file.

        The model's own weights and the optimizer are not in it. A collective. InputError: it cannot be written.
        """
        self._need_attached("save()")
        tensors: dict[str, torch.Tensor] = {}
        for number, task in enumerate(self._merged):
            updates = {adapter.name: adapter.merged[number] for adapter in self.adapters}
            tensors |= {f"merged.{task}.{name}": value for name, value in tensors_of(updates).items()}
        for task, memory in self._memories.items():
            tensors |= {f"memory.{task}.{name}": value for name, value in memory.items()}
        if self.task is not None:
            tensors |= {f"value.{name}": value for name, value in self._values().items()}
            tensors |= {f"state.{name}": value for name, value in self._method.state().items()}
        facts = {"begun": self._begun, "task": self.task, "merged": self._merged, "options": self._options()}
        agree(lambda: write_tensors(Path(path), tensors, {_FACTS: json.dumps(facts)}))

    def load(self, path: str | Path) -> None:
        """Puts a pool that has begun no task where another one was saved, on the same model with the same options.

        InputError: another file, other linears or options, or a pool that has begun a task.
        """
        self._need_attached("load()")
        if self._begun:
            raise InputError("load(): this pool has begun a task; attach a new one to a fresh model")
        file = TensorFile(Path(path))
        if _FACTS not in file.facts:
            raise InputError(f"{path}: was not written by pool.save()")
        facts = json.loads(file.facts[_FACTS])
        for name, value in self._options().items():
            if facts["options"][name] != value:
                raise InputError(f"{path}: was saved with {name}={facts['options'][name]}, this pool has {value}")
        places, device = self._method.update_places(), self.adapters[0].B.device
        merged = [updates_in(_below(file, f"merged.{task}."), places, str(path), device) for task in facts["merged"]]
        values = dict(_below(file, "value."))
        if facts["task"] is not None and values.keys() != self._values().keys():
            raise InputError(f"{path}: holds other layers than this model adapts")
        self._method.set_merged(merged)
        self._merged, self._begun = facts["merged"], facts["begun"]
        for task in self._merged:
            if memory := dict(_below(file, f"memory.{task}.")):
                self._memories[task] = memory
        if facts["task"] is None:
            self._switch(False)
            return
        self._begun = facts["task"]
        self.begin_task(facts["task"])
        with torch.no_grad():
            for name, parameter in self._values().items():
                parameter.copy_(values[name])
        self._method.load_state(dict(_below(file, "state.")))

    def _values(self) -> dict[str, nn.Parameter]:
        return {f"{a.name}.{name}": value for a in self.adapters for name, value in a.trainable_parameters().items()}

    def _options(self) -> dict[str, Any]:
        options = self._method.options.model_dump(mode="json", exclude={"guide"})
        return options | {"guide": dict(self._method.backbone.guide_of), "seed": self._method.config.seed}

    def _set_mode(self, mode: bool = True) -> nn.Module:
        """Stands in for the model's `train`, which `eval` calls, too."""
        if mode and self._is_shown:
            raise InputError("model.train(): inside `with pool.trained():` the model is evaluated")
        if mode and self.task is None and self._begun:
            raise InputError(
                f"model.train(): task {self._begun - 1} is merged, and training would count its experts twice; call "
                f"pool.begin_task({self._begun}) first"
            )
        if not mode and self.task is not None and not self._is_shown:
            raise InputError(
                f"model.eval(): task {self.task} is not in the weights yet; evaluate inside `with pool.trained():`, or "
                "call pool.merge() first"
            )
        return self._switch(mode)

    def _switch(self, mode: bool) -> nn.Module:
        del self.model.train  # the host may call it for a part that is the model itself
        try:
            self.model.train(mode)
            self._host.train(mode)
        finally:
            self.model.train = self._set_mode
        return self.model

    def _need_attached(self, call: str) -> None:
        if self._is_detached:
            raise InputError(f"{call}: the pool is detached from its model; attach a new one")

    def _need_open(self, call: str) -> None:
        self._need_attached(call)
        if self.task is None:
            raise InputError(f"{call}: no task is open; call pool.begin_task({self._begun}) first")


class _Guided:
    """What the method sees of a backbone. guide_of: by tower, the vector that its routers read."""

    def __init__(self, attach: Callable[..., list[LowRankLinear]], guide_of: Mapping[str, str]):
        self.attach, self.guide_of = attach, guide_of


class AttachedDac(Dac):
    """DAC on a model in one's own loop, whose towers can be others than a run's.

    options: those of DAC but the guide. attach: as a backbone's; guide_of: the guide of each of its towers, or of some;
    layers: on which linears adapters are put.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        seed: int,
        attach: Callable[..., list[LowRankLinear]],
        guide_of: Mapping[str, str],
        layers: Sequence[str] = (),
    ):
        targets = TargetsConfig.model_construct(towers=list(guide_of), layers=list(layers))
        # a method reads these alone of a run's configuration
        config = RunConfig.model_construct(seed=seed, options=dict(options), targets=targets)
        super().__init__(config, _Guided(attach, guide_of))

    def guide(self, tower: str) -> str:
        return self.backbone.guide_of[tower]


def attach_pool(
    model: nn.Module,
    *,
    targets: str | Sequence[str] | None = None,
    towers: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    rank: int = 12,
    alpha: float = 1.0,
    active: int = 8,
    merged: int = 4,
    dropout: float = 0.0,
    dropout_kind: Literal["element", "feature"] = "element",
    guide: Guide | Mapping[str, Guide] | None = None,
    router_grad: Literal["none", "straight_through", "gated"] = "none",
    vote: Literal["global", "lagged", "local"] = "global",
    ago_weight: float = 0.1,
    ago_reduction: Literal["sum_top", "paper_mean", "code_all"] = "sum_top",
    seed: int = 0,
) -> AttachedPool:
    """Freezes a model and puts a pool of rank-1 experts on its linears; returns the pool, with no task begun.

    model: an open_clip model or what `load_clip` gives, a CLIPModel, SiglipModel or vision-language model of
    transformers, an image model of timm, or, with targets, any module; before DistributedDataParallel wraps it.
    targets: names of linears or their ends, or a regular expression for whole names, as PEFT's target_modules.
    towers, layers: in place of targets, parts of a known model; all, but not a VLM's image tower, by default.
    rank: experts per linear; alpha: their update is scaled by alpha / rank; active: experts that a batch uses;
    merged: experts that a task leaves. dropout: rate on the experts' input, drawn per element, or per feature at no
    cost. guide: the vector that routers read, for all towers or by tower; None: a run's defaults, and the mean of the
    tokens under targets. router_grad: whether routers learn. vote: over all ranks in this step, over all in the step
    before, or of each rank alone. ago_weight, ago_reduction: of the loss that keeps tasks orthogonal. seed: of the
    experts. All as in a run's options (docs/methods/dac.md). InputError: a name or value that cannot be.
    """
    if isinstance(model, DistributedDataParallel):
        raise InputError("attach_pool: takes the model itself; wrap it by DistributedDataParallel afterwards")
    if getattr(model, "is_emptied", False):
        raise InputError("attach_pool: a pool of this model was detached; put the next one on what detach() returned")
    if any(isinstance(module, LowRankLinear) for module in model.modules()):
        raise InputError("attach_pool: the model has adapters already; call detach() of their pool first")
    if targets is not None and (towers is not None or layers is not None):
        raise InputError("attach_pool: targets names linears of any model, towers and layers those of a known one")
    options = {
        **{"rank": rank, "alpha": alpha, "active": active, "merged": merged, "dropout": dropout},
        **{"dropout_kind": dropout_kind, "router_grad": router_grad, "vote": vote},
        "ago": {"weight": ago_weight, "reduction": ago_reduction},
    }
    check_options(options)
    host = find_host(model, targets)
    try:
        chosen = _known(towers, "towers", host.towers, host.default_towers)
        on = _known(layers, "layers", host.layers, host.layers)
        guide_of = {tower: _guide(tower, guide, host) for tower in chosen}
        if router_grad != "none" and not set(chosen) <= set(host.even_towers):
            raise InputError(
                f"router_grad={router_grad}: only for towers that run as often on every rank; set "
                f"towers={list(host.even_towers)}"
            )
        return AttachedPool(host, AttachedDac(options, seed, host.attach, guide_of, on))
    except InputError:
        host.undo()
        raise


def check_options(options: dict[str, Any]) -> None:
    """InputError: options that DAC does not have or values that they cannot have."""
    try:
        Dac.Options.model_validate(options)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise InputError("; ".join(_told(fault) for fault in faults)) from error


def _told(fault: Any) -> str:
    name = "_".join(str(part) for part in fault["loc"])  # ago.weight is ago_weight here
    said = fault["msg"].removeprefix("Value error, ").replace("options.", "")
    hint = ""
    if fault["type"] == "literal_error":
        allowed = [word.strip("' ") for word in fault["ctx"]["expected"].replace(" or ", ",").split(",")]
        hint = nearest_name(str(fault["input"]), allowed)
    return f"{name}={fault['input']!r}: {said}{hint}" if name else said


def _known(given: Sequence[str] | None, key: str, known: Sequence[str], default: Sequence[str]) -> list[str]:
    if given is None:
        return list(default)
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        if name not in known:
            raise InputError(f"{key}: the model has no {name!r}{nearest_name(name, known)}; it has {', '.join(known)}")
    if not names:
        raise InputError(f"{key}: names nothing; the model has {', '.join(known)}")
    return names


def _guide(tower: str, given: str | Mapping[str, str] | None, host: Host) -> str:
    """Returns the guide of a tower. InputError: one that the tower does not have, or of a tower that is not there."""
    if tower in host.guides:
        default, choices = host.guides[tower][0], host.guides[tower]
    else:
        field = GuideOptions.model_fields[tower]
        default, choices = field.default, get_args(field.annotation)
    if isinstance(given, Mapping):
        for name in given:
            _known([name], "guide", host.towers, ())
        given = given.get(tower)
    name = default if given is None else given
    if name not in choices:
        raise InputError(
            f"guide={name!r}: not for the tower {tower}{nearest_name(name, choices)}; it has {', '.join(choices)}"
        )
    return name


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: tensors[name] for name in tensors if name.startswith(prefix)}
