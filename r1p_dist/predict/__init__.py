"""Predictions of a finished run's model, or of an exported one, beside those of the model before the run."""
