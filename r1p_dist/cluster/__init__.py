"""Clusters: jobs through submitit, sweeps, and what runs there are."""
