"""Fails unless the runs of both smoke recipes ended above zero-shot: python tools/check_smoke.py [runs]."""

import json
import sys
from pathlib import Path
from statistics import fmean

FIGURES = {"mini_mtil_smoke": "accuracy", "mini_instruct_smoke": "instruction_following"}

runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
failed = []
for recipe, figure in FIGURES.items():
    rows = json.loads((runs / recipe / "metrics.json").read_text(encoding="utf-8"))[figure]
    zero_shot, last = fmean(rows[0]), fmean(rows[-1])
    print(f"{recipe}: {figure} of zero-shot {zero_shot:.1f}, at the end {last:.1f}")
    if last <= zero_shot:
        failed.append(recipe)
sys.exit(f"error: not above zero-shot: {', '.join(failed)}" if failed else 0)
