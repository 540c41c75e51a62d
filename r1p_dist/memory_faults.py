"""Running out of memory, said in words that name what takes it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from r1p_dist.config import RunConfig
from r1p_dist.errors import InputError

# of torch's allocator on the CPU, which has no error class of its own, and of accelerators' libraries
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED")


@contextmanager
def memory_faults_named(config: RunConfig) -> Iterator[None]:
    """Makes an InputError, with the batch, the model and the remedies, of an error for want of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _WORDS):
            raise
        train = config.train
        where = "an accelerator" if isinstance(error, torch.OutOfMemoryError) else "the host"
        raise InputError(
            f"out of memory of {where}: train.global_batch_size={train.global_batch_size} in "
            f"train.gradient_accumulation_steps={train.gradient_accumulation_steps} micro steps, evaluation.batch_size="
            f"{config.evaluation.batch_size}, backbone.name={config.backbone.name}; take smaller batches, more "
            "train.gradient_accumulation_steps, backbone.gradient_checkpointing=true or deepspeed.config=zero3 (`r1p "
            "plan` predicts what fits)"
        ) from error
