"""An export needs the memory of a few tensors, not that of the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from r1p_dist.export.safetensors_writer import Entry, write_tensors
from tests.export.fake_run import SMALL_MODEL, write_model, write_run
from tests.small_llava import TEXT, VISION, make_model, make_processor

WIDTH = 768
MODEL = SMALL_MODEL | {"vision_cfg": {"image_size": 16, "patch_size": 8, "width": WIDTH, "head_width": 64, "layers": 6}}
LLAVA_TEXT = TEXT | {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 8}
LARGEST_TENSOR = 4 * WIDTH * WIDTH * 4  # bytes: fc1, or a decoder's gate, in fp32
MOST = 6 * LARGEST_TENSOR
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

exports = [argument.split(":") for argument in sys.argv[1:]]
for to, warm_up, _ in exports:
    export_run(Path(warm_up), to)
before = private_bytes()
for to, _, run in exports:
    seen, stop = [], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    export_run(Path(run), to)
    stop.set()
    thread.join()
    print("exported", to, len(seen), max(seen) - before)
"""


def write_weights(file: Path, model: torch.nn.Module) -> None:
    """Writes zeros of a model's shapes, in half precision, so that every tensor has to be converted."""
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    write_tensors(
        file, [Entry(name, shape, torch.bfloat16, lambda s=shape: torch.zeros(s)) for name, shape in shapes.items()]
    )


def write_clip_runs(tmp_path: Path) -> tuple[Path, Path]:
    """Writes a run of a small model, to warm up with, and one of a large model."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    with torch.device("meta"):
        model = open_clip.model.CLIP(**MODEL)
    write_weights(base / "open_clip_model.safetensors", model)
    small = write_model(tmp_path / "small", SMALL_MODEL)
    warm_up = write_run(tmp_path / "warm-up", [f"backbone.name=local-dir:{small}"])
    return warm_up, write_run(tmp_path / "run", [f"backbone.name=local-dir:{base}"])


def write_llava_runs(tmp_path: Path) -> tuple[Path, Path]:
    """Writes the same of LLaVAs."""
    base, small = tmp_path / "llava", tmp_path / "small-llava"
    make_model().save_pretrained(small)
    vision = {"model_type": "clip_vision_model", **VISION}
    config = LlavaConfig(vision_config=vision, text_config={"model_type": "llama", **LLAVA_TEXT})
    config.image_token_id = 3
    config.save_pretrained(base)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    write_weights(base / "model.safetensors", model)
    for folder in (small, base):
        make_processor().save_pretrained(folder)
    kind = "backbone.kind=llava"
    warm_up = write_run(tmp_path / "llava-warm-up", [kind, f"backbone.name={small}"])
    return warm_up, write_run(tmp_path / "llava-run", [kind, f"backbone.name={base}"])


@pytest.mark.slow
def test_an_export_holds_no_more_than_a_few_tensors(tmp_path: Path) -> None:
    clip, llava = write_clip_runs(tmp_path), write_llava_runs(tmp_path)
    exports = [("open_clip", *clip), ("hf", *clip), ("hf", *llava)]
    command = [sys.executable, "-c", WATCH, *(":".join(map(str, export)) for export in exports)]
    # freed memory must go back at once, or the peak is that of the allocator
    memory = {"MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_MMAP_THRESHOLD_": "524288", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True, env=os.environ | memory)
    measured = [line.split() for line in done.stdout.splitlines() if line.startswith("exported ")]
    for (to, _, run), (_, _, samples, growth) in zip(exports, measured, strict=True):
        file = {"open_clip": "open_clip_model.safetensors", "hf": "model.safetensors"}[to]
        assert (run / "export" / to / file).stat().st_size > 2 * MOST
        assert int(samples) > 10  # the watcher had its turns
        assert int(growth) < MOST, f"{run.name} {to}: {int(growth) / 1e6:.0f} MB"
