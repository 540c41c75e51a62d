"""Prints the lowest version that pyproject.toml allows of each dependency, as constraints for pip."""

import re
from pathlib import Path

# Not parsed as TOML: Python 3.10 cannot, and nothing is installed yet when this runs.
text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
for name, bound in re.findall(r'^  "([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)', text, re.MULTILINE):
    print(f"{name}=={bound}")
