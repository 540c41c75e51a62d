"""A page on this machine that predicts pictures by a run's model."""
