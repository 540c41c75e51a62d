"""Fail unless the runs of both smoke recipes ended above zero-shot."""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

FIGURES = {"mini_mtil_smoke": "accuracy", "mini_instruct_smoke": "instruction_following"}


def main() -> int:
    """Print the figures; return 1 where one is not above zero-shot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs"), help="holds both runs' folders (runs)")
    runs = parser.parse_args().runs
    failed = []
    for recipe, figure in FIGURES.items():
        rows = json.loads((runs / recipe / "metrics.json").read_text(encoding="utf-8"))[figure]
        zero_shot, last = fmean(rows[0]), fmean(rows[-1])
        print(f"{recipe}: {figure} of zero-shot {zero_shot:.1f}, at the end {last:.1f}")
        if last <= zero_shot:
            failed.append(recipe)
    if failed:
        print(f"error: not above zero-shot: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
