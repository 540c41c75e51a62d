"""`r1p convert` from a checkout: `python tools/convert_shards.py --help` shows how."""

import sys
from functools import partial

from r1p_dist.cli import run_command

main = partial(run_command, "convert")

if __name__ == "__main__":
    sys.exit(main())
