"""Submits runs and sweeps to a cluster through submitit, and shows how they stand:

    python launchers/submit.py --recipe mini_mtil --nodes 2 --gpus-per-node 8 --partition gpu --time 24:00:00
    python launchers/submit.py sweep --recipe mini_mtil --profile loopback options.rank=8,12,16 seed=0,1,2
    python launchers/submit.py status
    python launchers/submit.py logs runs/mini_mtil -f
    python launchers/submit.py cancel runs/mini_mtil

`--dry-run` prints the sbatch script; `--cluster local` runs on this machine.
"""

import sys
from functools import partial

from r1p_dist.cli import run_command

main = partial(run_command, "submit")

if __name__ == "__main__":
    sys.exit(main())
