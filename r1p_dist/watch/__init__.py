"""The report of a run on this machine, while the run goes on."""
