"""How well a model does on the tasks of a stream."""

from r1p_dist.evaluation.metrics import continual_metrics as continual_metrics
