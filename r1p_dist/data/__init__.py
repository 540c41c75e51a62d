"""Streams of tasks, their WebDataset shards, and the loaders that read them in an exact order."""

from r1p_dist.data.batches import Reference as Reference
from r1p_dist.data.encoders import Encoder as Encoder
from r1p_dist.data.encoders import PictureEncoder as PictureEncoder
from r1p_dist.data.loader import EvaluationLoader as EvaluationLoader
from r1p_dist.data.loader import TrainLoader as TrainLoader
from r1p_dist.data.loader import evaluation_loaders as evaluation_loaders
from r1p_dist.data.loader import train_loader as train_loader
from r1p_dist.data.samples import Sample as Sample
from r1p_dist.data.samples import Turn as Turn
from r1p_dist.data.shards import JointDataset as JointDataset
from r1p_dist.data.shards import ShardDataset as ShardDataset
from r1p_dist.data.stream import Stream as Stream
from r1p_dist.data.stream import Task as Task
