"""Reads a DeepSpeed JSON file and refuses what DeepSpeed 0.19 would silently ignore or die of.

DeepSpeed ignores unknown top-level keys and raises a traceback for unknown keys inside `zero_optimization`; here both
are one line with the nearest right name. Batch sizes, precision, clipping and the optimizer come from the run
configuration, so that one value has one place.
"""

import copy
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from r1p_dist.errors import InputError
from r1p_dist.files import read_text
from r1p_dist.shipped import shipped_files

REMOVED_KEYS = {
    "amp": "use train.precision",
    "compression_training": "remove it",
    "curriculum_learning": "remove it",
    "eigenvalue": "remove it",
    "elasticity": "remove it; the run configuration sets the batch sizes",
    "graph_harvesting": "remove it",
    "nebula": "remove it",
    "progressive_layer_drop": "remove it",
    "quantize_training": "remove it",
    "sparse_attention": "remove it",
    "sparse_gradients": "remove it",
    "zero_optimization.mics_hierarchical_params_gather": "remove it; zero_hpz_partition_size keeps a copy per node",
    "zero_optimization.mics_shard_size": "remove it; zero_hpz_partition_size keeps a copy per node",
    "zero_optimization.zeropp_loco_param": "remove it",
}

OWNED_KEYS = {
    "bf16.enabled": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "optimizer": "train.lr, train.betas and train.weight_decay",
    "scheduler": "train.lr, train.min_lr and train.warmup_steps",
    "torch_autocast": "train.precision",
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.global_batch_size",
}

UNMERGEABLE = {
    "zero_optimization.zero_quantized_nontrainable_weights": (
        (True,),
        "frozen weights would lie quantised; zero_quantized_weights quantises only what travels",
    ),
}

# Ends of the keys of zero_optimization whose values are numbers; all others but the sections are true or false.
OF_NUMBERS = ("_size", "_threshold", "live_parameters", "_distance")

TOP_LEVEL_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning bf16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_efficiency data_parallel_size data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown pipeline
    prescale_gradients seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel
    tensorboard timers use_data_before_expert_parallelism wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """.split()
)

ZERO_KEYS = frozenset(
    """
    allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients cpu_offload cpu_offload_param
    cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks ignore_unused_parameters leaf_module
    legacy_stage1 load_from_fp32_weights log_trace_cache_warnings memory_efficient_linear offload_optimizer
    offload_param overlap_comm override_module_apply parameter_alignment pipeline_loading_checkpoint
    reduce_bucket_size reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory stage
    stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
    stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
    stage3_module_granularity_threshold stage3_param_persistence_threshold stage3_prefetch_bucket_size
    stage3_use_all_reduce_for_fetch_params sub_group_size use_multi_rank_bucket_allreduce zenflow
    zero_hpz_partition_size zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
    """.split()
)


def load_deepspeed_config(name_or_path: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a shipped name (`zero2`) or a JSON file, with `overrides` merged in.

    The result has no batch sizes, precision or optimizer: the caller adds them from the run configuration.
    Raises InputError, naming file and key, for a missing or malformed file and for removed, unknown or owned keys.
    """
    path = _find(name_or_path)
    config = _read(path)
    _check(config, str(path))
    merged = _merge(config, overrides)
    _check(merged, f"deepspeed.overrides over {path}")
    return merged


def _find(name_or_path: str) -> Path:
    shipped = shipped_files("ds_configs", ".json")
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    nearest = difflib.get_close_matches(name_or_path, shipped, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise InputError(
        f"deepspeed.config: no file and no shipped configuration {name_or_path!r}; {hint}shipped: {', '.join(shipped)}"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_text(path), object_pairs_hook=_refuse_duplicates)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: the file must hold one JSON object, it holds a {type(config).__name__}")
    return config


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"key {key!r} stands there twice")
    return dict(pairs)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _check(config: Mapping[str, Any], source: str) -> None:
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise InputError(f"{source}: zero_optimization must be an object such as {{stage: 2}}, got {zero!r}")
    for key in _dotted_keys(config):
        if key in REMOVED_KEYS:
            raise InputError(f"{source}: DeepSpeed has removed {key}: {REMOVED_KEYS[key]}")
        if key in OWNED_KEYS:
            raise InputError(f"{source}: {key} comes from the run configuration: set {OWNED_KEYS[key]} instead")
    for key, (refused, reason) in UNMERGEABLE.items():
        value = _look_up(config, key)
        if value in refused:
            raise InputError(f"{source}: {key}={value}: no task could be merged into the weights: {reason}")
    _refuse_unknown(config, TOP_LEVEL_KEYS, "", source)
    _refuse_unknown(zero, ZERO_KEYS, "zero_optimization.", source)
    _check_values(zero, source)
    if config.get("gradient_clipping", 0.0) != 0.0:
        raise InputError(
            f"{source}: gradient_clipping={config['gradient_clipping']!r} comes from the run configuration: "
            "write 0.0 here and set train.gradient_clipping instead"
        )


def _check_values(zero: Mapping[str, Any], source: str) -> None:
    """Refuses values that DeepSpeed would take for others, or die of: a size that is a text, a stage that is none."""
    for key, value in zero.items():
        where = f"{source}: zero_optimization.{key}={value!r}"
        if isinstance(value, Mapping) or value is None or key in ("leaf_module", "zenflow"):
            continue
        if key == "stage":
            if isinstance(value, bool) or value not in (0, 1, 2, 3):
                raise InputError(f"{where}: must be 0, 1, 2 or 3")
        elif key.endswith(OF_NUMBERS):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError(f"{where}: must be a number from 0")
        elif not isinstance(value, bool):
            raise InputError(f"{where}: must be true or false")


def _look_up(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _dotted_keys(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        yield str(key)
        if isinstance(value, Mapping):
            yield from (f"{key}.{inner}" for inner in value)


def _refuse_unknown(section: Mapping[str, Any], allowed: frozenset[str], prefix: str, source: str) -> None:
    for key in section:
        if key not in allowed:
            nearest = difflib.get_close_matches(str(key), sorted(allowed), n=1)
            hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"allowed: {', '.join(sorted(allowed))}"
            raise InputError(f"{source}: unknown DeepSpeed key {prefix}{key}; {hint}")
