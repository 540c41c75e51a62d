"""Rank 0 of any number of ranks, run alone."""
