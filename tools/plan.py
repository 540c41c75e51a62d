"""`r1p plan` from a checkout: `python tools/plan.py --help` shows how."""

import sys
from functools import partial

from r1p_dist.cli import run_command

main = partial(run_command, "plan")

if __name__ == "__main__":
    sys.exit(main())
