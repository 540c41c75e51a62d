"""Write the report of a run again, and its accuracy matrix as a picture.

    python tools/report.py runs/mini_mtil
    python tools/report.py runs/mini_mtil --matrix docs/accuracy_matrix.png

Reads RUN_DIR/metrics.json, log.jsonl and config.yaml and writes RUN_DIR/report.html.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from r1p_dist.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; return 0, or 2 for wrong input."""
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--matrix", type=Path, metavar="PNG", help="write the accuracy matrix there too")
    arguments = parser.parse_args(argv)
    from r1p_dist.report import plot_matrix, write_report  # here, so that --help needs no matplotlib

    try:
        write_report(arguments.run_dir)
        if arguments.matrix:
            plot_matrix(arguments.run_dir, arguments.matrix)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
