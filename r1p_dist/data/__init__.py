"""Streams of tasks, their WebDataset shards, and the loaders that read them in an exact order."""

from r1p_dist.lazy import lazy_exports

_EXPORTS = {
    "Reference": "r1p_dist.data.batches",
    "Encoder": "r1p_dist.data.encoders",
    "PictureEncoder": "r1p_dist.data.encoders",
    "EvaluationLoader": "r1p_dist.data.loader",
    "TrainLoader": "r1p_dist.data.loader",
    "evaluation_loaders": "r1p_dist.data.loader",
    "train_loader": "r1p_dist.data.loader",
    "Sample": "r1p_dist.data.samples",
    "Turn": "r1p_dist.data.samples",
    "JointDataset": "r1p_dist.data.shards",
    "ShardDataset": "r1p_dist.data.shards",
    "Stream": "r1p_dist.data.stream",
    "Task": "r1p_dist.data.stream",
}

__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)
