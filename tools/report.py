"""`r1p report` from a checkout: `python tools/report.py --help` shows how."""

import sys
from functools import partial

from r1p_dist.cli import run_command

main = partial(run_command, "report")

if __name__ == "__main__":
    sys.exit(main())
