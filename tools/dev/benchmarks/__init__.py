"""What tools/dev/benchmark.py measures, one file per question."""
