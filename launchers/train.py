"""Entry for the DeepSpeed launcher, and for one rank without it:

    deepspeed --num_accelerators 2 launchers/train.py --recipe mini_mtil train.lr=1e-3
    python launchers/train.py --recipe mini_mtil

`--print-config` prints the resolved configuration and stops.
"""

import sys

from r1p_dist.cli import launcher_main

if __name__ == "__main__":
    sys.exit(launcher_main())
