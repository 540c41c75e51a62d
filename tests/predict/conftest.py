"""A run and its export, made by hand, and pictures, for all tests of predictions."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from r1p_dist.data import Stream
from r1p_dist.data.task_list import write_tasks
from r1p_dist.export import export_run
from tests.export.fake_run import SMALL_MODEL, TASKS, write_model, write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stream is gone."""
    folder = tmp_path_factory.mktemp("predict")
    base = write_model(folder / "base", SMALL_MODEL)
    run = write_run(folder / "run", [f"backbone.name=local-dir:{base}", f"tasks=[{','.join(TASKS)}]"])
    write_tasks(run, Stream.load("mini_mtil", tasks=TASKS).tasks)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("stream: mini_mtil", "stream: /gone/stream.yaml"))
    return run


@pytest.fixture(scope="session")
def exported(run: Path) -> Path:
    return export_run(run, "open_clip")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files, of which plain open_clip sees the same: one turned by its metadata, one of no format of shards."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = [np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8) for seed in range(2)]
    turned, exif = Image.fromarray(noise[0]), Image.Exif()
    exif[274] = 6
    turned.save(folder / "a.png", exif=exif)
    Image.fromarray(noise[1]).save(folder / "b.bmp")
    return [folder / "a.png", folder / "b.bmp"]
