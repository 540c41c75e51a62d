"""The settings of DeepSpeed's ZeRO that decide memory and collectives."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from r1p_dist.errors import InputError
from r1p_dist.planner.trace import Parameter

# They change what travels or where it lies in ways that are not described here.
_UNPLANNED = {
    "offload_optimizer": (None,),
    "offload_param": (None,),
    "round_robin_gradients": (False,),
    "stage3_allgather_sequential": (False,),
    "stage3_module_granularity_threshold": (0,),
    "stage3_use_all_reduce_for_fetch_params": (False,),
    "use_multi_rank_bucket_allreduce": (True,),
    "zero_hpz_partition_size": (1,),
    "zero_quantized_gradients": (False,),
    "zero_quantized_weights": (False,),
}


@dataclass(frozen=True)
class Zero:
    """Named as in DeepSpeed's JSON; sizes in numbers, not bytes."""

    stage: int
    reduce_bucket_size: int
    overlap_comm: bool
    persistence_threshold: int
    max_reuse_distance: int
    prefetch_bucket_size: int
    max_live: int
    has_clipping: bool
    takes_norm: bool
    checks_overflow: bool

    @classmethod
    def of(cls, resolved: Mapping[str, Any]) -> "Zero":
        """Reads a resolved DeepSpeed configuration. InputError: a setting that the planner does not know to count."""
        zero = resolved["zero_optimization"]
        for key, allowed in _UNPLANNED.items():
            if key in zero and zero[key] not in allowed:
                raise InputError(
                    f"zero_optimization.{key}={zero[key]!r}: the planner does not count this; leave it out"
                )
        stage = zero["stage"]
        return cls(
            stage,
            int(zero.get("reduce_bucket_size", 5e8)),
            bool(zero.get("overlap_comm", stage == 3)),
            int(zero.get("stage3_param_persistence_threshold", 1e5)),
            int(zero.get("stage3_max_reuse_distance", 1e9)),
            int(zero.get("stage3_prefetch_bucket_size", 5e7)) if stage == 3 else 0,
            int(zero.get("stage3_max_live_parameters", 1e9)),
            resolved["gradient_clipping"] > 0,
            bool(zero.get("compute_grad_norm", True)),
            resolved["bf16"]["enabled"] and resolved["bf16"].get("check_grad_overflow", True),
        )

    def is_persistent(self, parameter: Parameter) -> bool:
        """Whether stage 3 keeps a whole copy of a parameter on every rank."""
        return parameter.numel <= self.persistence_threshold
