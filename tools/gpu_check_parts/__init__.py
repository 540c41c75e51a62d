"""What tools/gpu_check.py checks, one file per part; each case of a part runs in a process of its own."""
