"""DeepSpeed: the process group, the engine of one task, and what must be undone between tasks."""

import math
import os
import shutil
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import compiler
from torch import nn

from r1p_dist.backbones import Placement
from r1p_dist.config import RunConfig, TrainConfig
from r1p_dist.distributed import world_size
from r1p_dist.ds_config import load_deepspeed_config
from r1p_dist.errors import InputError, one_line
from r1p_dist.methods import method_class
from r1p_dist.optimizer import make_optimizer
from r1p_dist.optimizer_state import set_adam_steps
from r1p_dist.precision import choose_precision, precision_type
from r1p_dist.rendezvous import export_rendezvous, is_plain_srun, take_device

_START_TIMEOUT = timedelta(minutes=30)


def start_process_group() -> torch.device:
    """Joins the process group of the launcher or of srun, or makes one of a single rank; returns this rank's device.

    InputError: a rank that is left without one, a port that is taken, or no compiler where ranks on CPUs need one.
    """
    # DeepSpeed 0.19 calls collectives by names that torch 2.14 is about to drop: thousands of warnings under ZeRO-3.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if is_plain_srun():
        export_rendezvous()
    if "RANK" not in os.environ:
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update({name: os.environ.get(name, value) for name, value in single.items()})
    device = torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        # before the group is made: its communicators are tied to the device
        index = take_device(torch.accelerator.device_count())
        device = torch.device(accelerator.type, index)
        torch.accelerator.set_device_index(index)
    if os.environ["WORLD_SIZE"] == "1":
        # what ranks of one node exchange through is compiled where it is missing
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, timeout=_START_TIMEOUT, verbose=False)
    except (RuntimeError, OSError) as error:
        if (reason := _why_no_group(error)) is None:
            raise
        raise InputError(reason) from error
    return device


def _why_no_group(error: Exception) -> str | None:
    """Returns what a user can do about an error at the start of the process group; None for one that nobody expects."""
    text, port = one_line(error), os.environ["MASTER_PORT"]
    if any(words in text for words in ("EADDRINUSE", "address already in use")):
        return (
            f"MASTER_PORT={port}: another program has this port, perhaps another training; wait for it, or give one "
            "that is free: deepspeed --master_port N"
        )
    if any(words in text for words in ("Ninja is required", "Error building extension")):
        program = os.environ.get("CXX", "c++")
        lack = "fails, see launch.log of the run" if shutil.which(program) else "is missing: apt install g++"
        return (
            f"{program}: the C++ compiler {lack}; DeepSpeed builds with it what several ranks on CPUs exchange "
            "through (one rank needs none; `r1p doctor` says more)"
        )
    return None


def resolve_deepspeed(config: RunConfig, world_size: int) -> dict:
    """Returns the DeepSpeed configuration: the JSON file with overrides, batch sizes, clipping and precision filled in.

    Raises InputError where the global batch does not divide among ranks.
    """
    resolved = load_deepspeed_config(config.deepspeed.config, config.deepspeed.overrides)
    train = config.train
    micro_batch_size = train.micro_batch_size(world_size)
    if train.compile and resolved["zero_optimization"]["stage"] == 3:
        raise InputError(
            f"train.compile=true with deepspeed.config={config.deepspeed.config}: compiled blocks keep their weights, "
            "and ZeRO stage 3 takes them away; use deepspeed.config=zero2 or train.compile=false"
        )
    resolved["train_batch_size"] = train.global_batch_size
    resolved["train_micro_batch_size_per_gpu"] = micro_batch_size
    resolved["gradient_accumulation_steps"] = train.gradient_accumulation_steps
    resolved["gradient_clipping"] = train.gradient_clipping or 0.0
    resolved["bf16"] = {**resolved.get("bf16", {}), "enabled": choose_precision(train.precision)[0] == "bf16"}
    # The host would wait for the device at every step, for what GuardedAdamW sees to without it.
    resolved["bf16"].setdefault("check_grad_overflow", False)
    zero = resolved["zero_optimization"]
    if zero["stage"] in (1, 2) and not resolved["gradient_clipping"] and "offload_optimizer" not in zero:
        zero.setdefault("compute_grad_norm", False)
    return resolved


def weights_placement(config: RunConfig, device: torch.device) -> Placement:
    """Returns where a run's frozen weights go: sharded under ZeRO-3, whole for a method that trains nothing."""
    resolved = resolve_deepspeed(config, world_size())
    is_sharded = resolved["zero_optimization"]["stage"] == 3 and method_class(config.method).trains
    return Placement(device, precision_type(config.train.precision), resolved if is_sharded else None)


def learning_rate(step: int, train: TrainConfig) -> float:
    """Returns the rate of optimizer step `step` (from 0): linear warm-up, then cosine from lr to min_lr."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, train.iterations - train.warmup_steps)
    return train.min_lr + (train.lr - train.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _import_muon() -> None:
    """Imports DeepSpeed's Muon without compiling it; DeepSpeed asks any optimizer whether it is one.

    Compiled, it takes 3 s of CPU on every rank and at every start, for the compiler that its decorators set up.
    """
    compile_function = compiler.compile
    compiler.compile = lambda *arguments, **settings: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_function


class TaskEngine:
    """A DeepSpeed engine around the backbone for one task: AdamW on the adapters, fresh moments, own schedule.

    Calling it runs the backbone's forward. `close` takes away the hooks that DeepSpeed leaves on the model.
    """

    def __init__(
        self,
        backbone: nn.Module,
        config: RunConfig,
        train: TrainConfig,
        world_size: int,
        guard: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        """guard: as in `GuardedAdamW`."""
        for module in backbone.modules():
            # ZeRO-3 fetches a module's own parameters only. A leaf module would fetch its children's too, but is
            # released too early where its input needs no gradient, as in the first block.
            for parameter in getattr(module, "borrowed_parameters", list)():
                deepspeed.zero.register_external_parameter(module, parameter)
        _import_muon()
        parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(parameters, train)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, train) / train.lr)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # DeepSpeed declares narrower types than it takes.
            engine, *_ = deepspeed.initialize(
                model=backbone,
                model_parameters=parameters,  # pyright: ignore[reportArgumentType]
                optimizer=optimizer,
                lr_scheduler=schedule,  # pyright: ignore[reportArgumentType]
                config=resolve_deepspeed(config, world_size),
            )
        self.engine: Any = engine  # it gets many of its attributes from its configuration
        optimizer.guard = guard  # not before: DeepSpeed makes some optimizers' states by a step of its own

    def __call__(self, *args, **kwargs):
        return self.engine(*args, **kwargs)

    @property
    def lr(self) -> float:
        return self.engine.optimizer.param_groups[0]["lr"]

    def step(self, loss: torch.Tensor) -> bool:
        """Backward and, at the end of an accumulation, an optimizer step; returns whether it was one."""
        is_last = self.engine.is_gradient_accumulation_boundary()
        self.backward(loss)
        if is_last:
            self.update()
        return is_last

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of one micro batch; before the last one of an accumulation that is all there is to it."""
        is_last = self.engine.is_gradient_accumulation_boundary()
        self.engine.backward(loss)
        if not is_last:
            self.engine.step()  # counts

    def backward_whole_step(self, loss: torch.Tensor) -> None:
        """Backward of a loss that stands for all micro batches of the step, whose gradient is taken as it is."""
        micro_batches = self.engine.gradient_accumulation_steps()
        self.engine.micro_steps += micro_batches - 1
        self.backward(micro_batches * loss)  # the engine divides

    def update(self) -> None:
        """Makes the optimizer step. RuntimeError: backwards of an accumulation are missing."""
        if not self.engine.is_gradient_accumulation_boundary():
            raise RuntimeError("update() before the backward of every micro batch of the step")
        self.engine.step()
        if not self.engine.was_step_applied():
            self.engine.lr_scheduler.step()  # the schedule counts steps, also one that DeepSpeed left out

    def go_on_at(self, step: int, adam_steps: int) -> None:
        """Sets the counters and the learning rate to those after `step` optimizer steps."""
        engine, schedule = self.engine, self.engine.lr_scheduler
        engine.global_steps, engine.micro_steps = step, step * engine.gradient_accumulation_steps()
        engine.global_samples = step * engine.train_batch_size()
        set_adam_steps(engine, adam_steps)
        schedule.last_epoch, schedule._step_count = step, step + 1
        factors = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
        for group, base, factor in factors:
            group["lr"] = base * factor(step)
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]

    def close(self) -> None:
        self.engine.destroy()
        # Else it is called again when Python finds the engine unused, which can be after the next one was made on the
        # same parameters, and takes away what that one keeps on them: parts of a checkpoint were zeros.
        self.engine.destroy = _nothing
        _remove_deepspeed_hooks(self.engine.module)
        for module in self.engine.module.modules():
            # else the next engine's backward goes on with this one's: it would fetch weights twice
            for name in ("pre_bwd_fn", "post_bwd_fn"):
                module.__dict__.pop(name, None)


def _nothing() -> None:
    pass


_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def _remove_deepspeed_hooks(model: nn.Module) -> None:
    """Takes away the hooks that DeepSpeed put on modules; a method's and others' stay."""
    for module in model.modules():
        for table in _HOOK_TABLES:
            hooks = getattr(module, table)
            for key in [key for key, hook in hooks.items() if _is_deepspeeds(hook)]:
                del hooks[key]


def _is_deepspeeds(hook: Callable) -> bool:
    function = getattr(hook, "func", hook)  # of a partial
    return (getattr(function, "__module__", None) or "").split(".")[0] == "deepspeed"
