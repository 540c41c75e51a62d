"""The tuner: pools on the linears that a configuration names, votes and the AGO term, and the tasks of a stream."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from r1p_dist.adapters import Routing, take_penalties
from r1p_dist.attached_pool import AttachedDac
from r1p_dist.backbones.plain import tell_prompts
from r1p_dist.errors import InputError
from r1p_dist.peft.config import R1PConfig
from r1p_dist.peft.layer import R1PLinear, StreamPool


class R1PModel(BaseTuner):
    """A model with pools of rank-1 experts; what `get_peft_model` gives has its methods.

    In training each sample votes, over all ranks where there is a process group, and where the model returns a loss the
    AGO term is added to it. TRL takes its loss from log probabilities that come with it, whose backward adds the term's
    gradient. Otherwise a task counts as merged: evaluation, `merge_adapter` and `merge_and_unload` give
    the same outputs. A stream trains task after task with `next_task()` between them.
    """

    prefix = "r1p_"
    tuner_layer_cls = R1PLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # R1PCallback's, of the AGO term: in a loss that a Trainer does not divide by its micro steps, and past every loss
    penalty_share = gradient_share = 1.0
    has_scaled_loss = False  # R1PCallback's: the Trainer multiplies the loss, for fp16

    def _pre_injection_hook(self, model: nn.Module, config: R1PConfig, adapter_name: str) -> None:
        if "_routing" not in vars(self):
            self._routing, self._methods = Routing(), {}
            self._hooks = [
                model.register_forward_pre_hook(self._hear, with_kwargs=True),
                model.register_forward_hook(self._add_penalty, with_kwargs=True),
            ]

    def _create_and_replace(
        self,
        peft_config: R1PConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **options: Any,
    ) -> None:
        layer = target
        if not isinstance(layer, R1PLinear):
            if type(target).forward is not nn.Linear.forward:
                raise InputError(
                    f"target_modules: {current_key} is a {type(target).__name__}; experts go on torch.nn.Linear alone"
                )
            layer = R1PLinear(target)
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, peft_config, self._routing, current_key)
        if adapter_name not in self.active_adapters:
            layer.r1p_pool[adapter_name].requires_grad_(False)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config, pools = self.peft_config[adapter_name], self.pools(adapter_name)
        method = AttachedDac(config.options(), config.seed, lambda *_: pools, {"model": config.guide})
        self._methods[adapter_name] = method
        self._begin(method, config.tasks)

    def pools(self, adapter_name: str) -> list[StreamPool]:
        """Returns the pools of an adapter, in the model's order."""
        layers = (module for module in self.model.modules() if isinstance(module, R1PLinear))
        return [layer.r1p_pool[adapter_name] for layer in layers if adapter_name in layer.r1p_pool]

    def next_task(self) -> None:
        """Ends a task of a stream: keeps its most counted experts, and begins the next one with fresh ones.

        Give the next task a new optimizer. InputError: several adapters are active, the adapter is merged, or the task
        was not trained.
        """
        if len(self.active_adapters) != 1:
            raise InputError("next_task(): needs one active adapter; choose it by model.set_adapter(name)")
        (name,) = self.active_adapters
        pools, config = self.pools(name), self.peft_config[name]
        if any(layer.merged for layer in self.model.modules() if isinstance(layer, R1PLinear)):
            raise InputError("next_task(): the adapter is merged; call model.unmerge_adapter() first")
        if not any(pool.activation_counts.any() for pool in pools):
            raise InputError(f"next_task(): task {config.tasks} made no training step, so no expert has a vote")
        for pool in pools:
            pool.end_task()
        config.tasks += 1
        self._begin(self._methods[name], config.tasks)

    def penalty(self) -> torch.Tensor:
        """Returns the AGO term with its weight, (), of the forward just made, where the model returned no loss."""
        terms = take_penalties([pool for method in self._methods.values() for pool in method.adapters])
        return sum(terms.values(), torch.zeros((), device=next(self.model.parameters()).device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)  # PEFT's own goes past the hooks

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        del self._methods[adapter_name]

    def _begin(self, method: AttachedDac, task: int) -> None:
        method.prepare(task)
        method.set_past([])

    def _hear(self, model: nn.Module, inputs: tuple, given: dict[str, Any]) -> None:
        tell_prompts(self._routing, inputs, given)

    def _add_penalty(self, model: nn.Module, inputs: tuple, given: dict[str, Any], output: Any) -> None:
        loss = getattr(output, "loss", None)
        if model.training and isinstance(loss, torch.Tensor):
            share = 1.0 if given.get("num_items_in_batch") is None else self.penalty_share
            penalty = self.penalty().to(loss.device)
            output.loss = loss + share * penalty
            log_probs = getattr(output, "log_probs", None)
            if isinstance(log_probs, torch.Tensor):
                if self.has_scaled_loss:
                    raise InputError(
                        "fp16: its loss scaling would not reach the AGO term, which TRL leaves out of its loss; use "
                        "bf16 or fp32"
                    )
                output.log_probs = _WithPenalty.apply(log_probs, self.gradient_share * penalty)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        for hook in self._hooks:
            hook.remove()
        return super()._unload_and_optionally_merge(*args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".r1p_pool.{adapter_name}.", ".r1p_pool.")


class _WithPenalty(torch.autograd.Function):
    """What a loss is computed from, as it is; its backward gives the penalty the gradient that it has in a sum."""

    @staticmethod
    def forward(ctx, value: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
        ctx.one = torch.ones_like(penalty)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, ctx.one
