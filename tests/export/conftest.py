"""What tests of exports share."""

from pathlib import Path

import pytest

from tests.export.fake_run import SMALL_MODEL, write_model, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run of two tasks on a small CLIP."""
    base = write_model(tmp_path / "base", SMALL_MODEL)
    return write_run(tmp_path / "run", [f"backbone.name=local-dir:{base}"])
