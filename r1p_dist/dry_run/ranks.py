"""The configuration of a dry run, for any number of ranks."""

from r1p_dist.config import RunConfig
from r1p_dist.errors import InputError


def set_ranks(config: RunConfig, ranks: int, batch: int | None) -> RunConfig:
    """Returns the configuration for so many ranks. batch: samples of each in a micro step; None: as the recipe has it.

    InputError: numbers below 1, or a global batch that does not divide.
    """
    for flag, value in (("--ranks", ranks), ("--batch", batch)):
        if value is not None and value < 1:
            raise InputError(f"{flag} {value}: must be from 1")
    micro_steps, size = config.train.gradient_accumulation_steps, config.train.global_batch_size
    if batch is not None:
        size = ranks * batch * micro_steps
    if size % (ranks * micro_steps):
        raise InputError(
            f"--ranks {ranks}: train.global_batch_size={size} does not divide into {ranks} ranks times "
            f"train.gradient_accumulation_steps={micro_steps}; give --batch N, the samples of each rank in a micro "
            f"step, or a multiple of {ranks * micro_steps}"
        )
    return config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": size})})
