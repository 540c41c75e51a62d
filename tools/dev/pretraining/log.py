"""The log of a pretraining: one JSON object per line, shown and kept."""

import json
from collections.abc import Callable
from pathlib import Path


def open_log(output: Path) -> Callable[..., None]:
    """Begins OUTPUT/pretrain.log; returns what adds a line of named values to it and prints it."""
    log = (output / "pretrain.log").open("w")

    def report(**values: object) -> None:
        print(json.dumps(values), flush=True)
        print(json.dumps(values), file=log, flush=True)

    return report
