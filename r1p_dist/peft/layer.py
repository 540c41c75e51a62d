"""A linear with pools of rank-1 experts, one for each adapter of PEFT.

PEFT wants the base weight untouched until a merge, so what past tasks left is a thin product of its own here.
"""

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from r1p_dist.adapters import AdaptedLinear, Factors, MergedWeight, Routing
from r1p_dist.errors import InputError
from r1p_dist.peft.config import R1PConfig


class StreamPool(AdaptedLinear):
    """The pool of the task in training, past_A (n, in) and past_B (out, n): the merged experts of the tasks before."""

    def __init__(self, linear: nn.Linear, config: R1PConfig, routing: Routing, name: str):
        super().__init__(
            linear,
            config.r,
            config.alpha,
            config.active,
            config.merged,
            config.dropout,
            guide=config.guide,
            router_grad=config.router_grad,
            rows=slice(0, linear.out_features),  # the linear stays the layer's
            routing=routing,
        )
        self.name = name
        del self.past_B
        count = config.tasks * config.merged
        for which, shape in (("past_A", (count, self.in_features)), ("past_B", (self.out_features, count))):
            self.register_buffer(which, torch.zeros(shape, device=linear.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the layer's output in training."""
        return _plus(super().forward(x), x, Factors(self.past_A, self.past_B, self.scaling))

    def deployed(self) -> Factors:
        """Returns what a merge adds to the weight: past tasks' experts and the most counted ones of this task."""
        update, _ = self.update(self.merge_count)
        A, B = torch.cat([self.past_A, update.A]), torch.cat([self.past_B, update.B], dim=1)
        return Factors(A, B, self.scaling)

    def end_task(self) -> None:
        """Makes the most counted experts past ones."""
        self.past_A, self.past_B, _, _ = self.deployed()


class R1PLinear(nn.Module, BaseTunerLayer):
    """A linear and its pools by the adapter's name."""

    adapter_layer_names = ("r1p_pool",)

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.r1p_pool = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self._weight, self._merged_updates = MergedWeight(base_layer.weight), {}

    def update_layer(self, adapter_name: str, config: R1PConfig, routing: Routing, name: str) -> None:
        """Adds the pool of an adapter. InputError: the layer is too small for it."""
        self.r1p_pool[adapter_name] = StreamPool(self.base_layer, config, routing, name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _freeze_non_trainable_peft_weights(self, adapter_names: list[str] | None = None) -> None:
        """PEFT calls this whenever it has made all of an adapter trainable."""
        for pool in self.r1p_pool.values():
            if pool.router_grad == "none":
                pool.router.requires_grad_(False)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        pools = [self.r1p_pool[name] for name in self.active_adapters if name in self.r1p_pool]
        if self.training and any(pool.A.requires_grad for pool in pools):
            if len(pools) > 1:
                raise InputError("several R1P adapters are active: train one at a time, by model.set_adapter(name)")
            return pools[0](x)
        y = self.base_layer(x, *args, **kwargs)
        for pool in pools:
            y = _plus(y, x, pool.deployed())
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters, the active ones by default, into the base weight."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.r1p_pool:
                continue
            update = self.r1p_pool[name].deployed()
            if safe_merge and not (update.A.isfinite().all() and update.B.isfinite().all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._merged_updates[name] = update
            self._weight.set(list(self._merged_updates.values()))
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Gives the base weight back, bit for bit."""
        self.merged_adapters.clear()
        self._merged_updates.clear()
        self._weight.set([])


def _plus(y: torch.Tensor, x: torch.Tensor, update: Factors) -> torch.Tensor:
    if not len(update.A):
        return y
    kept = F.linear(x, update.A.to(x.dtype))
    return y + (update.scaling * F.linear(kept, update.B.to(x.dtype))).to(y.dtype)
