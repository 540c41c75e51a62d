"""`python -m r1p_dist` is `r1p`: for a launcher that starts a module."""

import sys

from r1p_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
