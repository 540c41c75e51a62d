"""Second moments of a backbone's layer inputs, measured on data like those of its pretraining: a file of statistics."""
