"""Entry for the DeepSpeed launcher, and for one rank without it:

    deepspeed --num_accelerators 2 launchers/train.py --recipe mini_mtil train.lr=1e-3
    python launchers/train.py --recipe mini_mtil

`--print-config` prints the resolved configuration and stops.
"""

import sys
from functools import partial

from r1p_dist.cli import run_command

main = partial(run_command, "train")

if __name__ == "__main__":
    sys.exit(main())
