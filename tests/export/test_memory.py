"""An export needs the memory of a few tensors, not that of the model."""

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import torch

from r1p_dist.export.safetensors_writer import Entry, write_tensors
from tests.export.fake_run import SMALL_MODEL, write_model, write_run

WIDTH = 1024
MODEL = SMALL_MODEL | {"vision_cfg": {"image_size": 16, "patch_size": 8, "width": WIDTH, "head_width": 64, "layers": 6}}
LARGEST_TENSOR = 4 * WIDTH * WIDTH * 4  # bytes: fc1 in fp32
WATCH = """
import re, sys, threading
from pathlib import Path
from r1p_dist.export import export_run

def private_bytes():
    with open("/proc/self/smaps_rollup") as file:
        return int(re.search(r"Pss_Anon: *([0-9]+) kB", file.read())[1]) * 1024

def watch():
    while not stop.wait(0.002):
        seen.append(private_bytes())

warm_up, run = map(Path, sys.argv[1:])
for to in ("open_clip", "hf"):
    export_run(warm_up, to)
before = private_bytes()
for to in ("open_clip", "hf"):
    seen, stop = [], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    export_run(run, to)
    stop.set()
    thread.join()
    print(to, len(seen), max(seen) - before)
"""


def test_an_export_holds_no_more_than_a_few_tensors(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in open_clip.model.CLIP(**MODEL).state_dict().items()}
    # in half precision, so that every tensor has to be converted
    entries = [Entry(name, shape, torch.bfloat16, lambda s=shape: torch.zeros(s)) for name, shape in shapes.items()]
    write_tensors(base / "open_clip_model.safetensors", entries)
    small = write_model(tmp_path / "small", SMALL_MODEL)
    warm_up = write_run(tmp_path / "warm-up", [f"backbone.name=local-dir:{small}"])
    run = write_run(tmp_path / "run", [f"backbone.name=local-dir:{base}"])
    done = subprocess.run(
        [sys.executable, "-c", WATCH, warm_up, run], capture_output=True, text=True, timeout=120, check=True
    )
    exports = [line.split() for line in done.stdout.splitlines() if line.startswith(("open_clip ", "hf "))]
    assert [to for to, *_ in exports] == ["open_clip", "hf"]
    for to, samples, growth in exports:
        file = {"open_clip": "open_clip_model.safetensors", "hf": "model.safetensors"}[to]
        assert (run / "export" / to / file).stat().st_size > 15 * LARGEST_TENSOR
        assert int(samples) > 50
        assert int(growth) < 6 * LARGEST_TENSOR, f"{to}: {int(growth) / 1e6:.0f} MB"
