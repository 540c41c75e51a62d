"""What was meant by a key that the configuration does not have."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

# The field's other words for what has a name here.
_WORDS = {
    "train.lr": "learning_rate base_lr init_lr max_lr",
    "train.min_lr": "lr_min eta_min end_lr",
    "train.global_batch_size": "batch_size bs batch train_batch_size per_device_train_batch_size micro_batch_size",
    "train.gradient_accumulation_steps": "grad_accum grad_accumulation_steps accumulate_grad_batches",
    "train.iterations": "epochs num_epochs num_train_epochs max_epochs steps max_steps num_steps iters max_iters",
    "train.warmup_steps": "warmup warmup_iters num_warmup_steps warmup_ratio",
    "train.weight_decay": "wd decay",
    "train.gradient_clipping": "max_grad_norm grad_clip clip_grad clip_grad_norm gradient_clip_val",
    "train.precision": "dtype bf16 fp16 fp32 amp mixed_precision torch_dtype",
    "evaluation.batch_size": "eval_batch_size per_device_eval_batch_size val_batch_size test_batch_size",
    "backbone.name": "model model_name model_name_or_path arch architecture backbone_name",
    "backbone.pretrained": "weights pretrained_weights ckpt",
    "stream": "dataset datasets data_dir data_path data_root dataset_name",
    "tasks": "task",
    "data.workers": "num_workers dataloader_num_workers n_workers",
    "data.shots": "k_shot num_shots few_shot",
    "data.replay_share": "replay replay_ratio",
    "run_dir": "output output_dir out_dir save_dir log_dir work_dir exp_dir logdir",
    "resume": "resume_from resume_from_checkpoint checkpoint_path load",
    "checkpoint.every_steps": "save_steps save_every checkpoint_every",
    "log.every_steps": "log_steps logging_steps log_interval log_every print_freq",
    "log.trackers": "tensorboard wandb mlflow report_to trackers logger loggers log_with",
    "deepspeed.config": "ds_config deepspeed_config zero_stage zero",
    "options.rank": "rank lora_rank lora_r r",
    "options.alpha": "alpha lora_alpha",
    "options.dropout": "lora_dropout dropout",
    "seed": "random_seed manual_seed",
    "method": "algorithm algo strategy",
}
_ALSO_SAID = {
    "train.iterations": " (optimizer steps of a task; there are no epochs)",
    "train.global_batch_size": " (of all ranks together)",
}
# What a section's own name is usually given for.
_MEANT = {"deepspeed": "deepspeed.config", "backbone": "backbone.name", "data": "stream", "train": "train.iterations"}


def hint_at_key(key: Sequence[str], allowed: Sequence[str], every: Iterable[str]) -> str:
    """Returns `did you mean …? ` for an unknown key, or nothing. allowed: what could stand in its place; every: all
    dotted keys."""
    every = list(every)
    word = key[-1].lower().replace("-", "_")
    meant = [dotted for dotted, words in _WORDS.items() if word in words.split()]
    meant += [dotted for dotted in every if dotted.split(".")[-1] == key[-1]]
    if meant:
        return f"did you mean {' or '.join(dotted + _ALSO_SAID.get(dotted, '') for dotted in meant)}? "
    nearest = difflib.get_close_matches(key[-1], allowed, n=1)
    if nearest:
        return f"did you mean {'.'.join((*key[:-1], nearest[0]))}? "
    anywhere = difflib.get_close_matches(".".join(key), every, n=1)
    return f"did you mean {anywhere[0]}? " if anywhere else ""


def hint_at_section(key: Sequence[str], value: Any) -> str:
    """Returns which key of a section was meant where the section itself was given a value, or nothing."""
    meant = _MEANT.get(key[-1])
    return f"; did you mean {meant}={value}?" if meant else ""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Returns `, did you mean …?` for a name that is not among the known ones, or nothing."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {nearest[0]!r}?" if nearest else ""
