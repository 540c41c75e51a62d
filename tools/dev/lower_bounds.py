"""Print the lowest version that pyproject.toml allows of each dependency, as constraints for pip."""

import argparse
import re
from pathlib import Path


def main() -> None:
    """Print a line for each dependency."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    # Not parsed as TOML: Python 3.10 cannot, and nothing is installed yet when this runs.
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for name, bound in re.findall(r'^  "([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)', text, re.MULTILINE):
        print(f"{name}=={bound}")


if __name__ == "__main__":
    main()
