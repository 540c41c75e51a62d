"""`r1p compare` from a checkout: `python tools/compare.py --help` shows how."""

import sys
from functools import partial

from r1p_dist.cli import run_command

main = partial(run_command, "compare")

if __name__ == "__main__":
    sys.exit(main())
