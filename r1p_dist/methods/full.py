"""Full fine-tuning, one task after another: what forgetting is usually shown with."""

from r1p_dist.protocol import FullMethod


class Full(FullMethod):
    """Full fine-tuning: every weight of the towers in `targets.towers` is trained, task after task.

    A CLIP's temperature stays as it is. `targets.layers` does not matter. AdamW decays weights towards zero: set
    `train.weight_decay` with that in mind.
    """
