"""How fast pictures become batches: against plain webdataset, for several decoders, and what a training step waits.

The pictures are shipped ones, enlarged and written as JPEG shards by the converter. *loader* and *webdataset* read the
same shards with the same decoder, augmentation and batch size in one process without workers: the loader reads them in
its own order, webdataset from the beginning of each shard. The decoders read the same pictures from memory; only those
whose pixels are PIL's can replace it without changing what open_clip's transforms give. data_wait is the share of a
training run's time that the loop waits for a batch, from its log.
"""

import argparse
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
import webdataset
from PIL import Image

from benchmarks.measure import interleaved, medians, processor, ratio
from r1p_dist.data import PictureEncoder, ShardDataset, Stream, TrainLoader
from r1p_dist.data.convert import ConvertOptions, convert, open_source
from r1p_dist.data.convert.sources import SourceOptions
from r1p_dist.data.samples import decode_picture
from r1p_dist.data.transforms import evaluation_transform, train_transform
from r1p_dist.recipes import load_config
from r1p_dist.train import run as train

TASK = "country_flags"
BATCH = 32


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the ratio loader/webdataset in samples per second, times of the decoders, and data_wait by workers."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        task = _write_task(Path(folder), arguments)
        seconds = interleaved(_readers(task, arguments), arguments.pairs)
        decoding = interleaved(_decoders(task, arguments.input), arguments.pairs)
        waits = {workers: _data_wait(Path(folder), arguments.steps, workers) for workers in (0, 1) if arguments.steps}
    return {
        "processor": processor(),
        "size": list(arguments.size),
        "input": arguments.input,
        "loader/webdataset": round(ratio(seconds, "webdataset", "loader"), 3),
        "samples_per_second": {name: round(arguments.samples / s, 1) for name, s in medians(seconds).items()},
        "pil/decoder": {
            name: {
                "decode": round(ratio(decoding, "pil", name), 3),
                "decode and transform": round(ratio(decoding, "pil, transform", f"{name}, transform"), 3),
                "equal pixels": _equals_pil(decode),
            }
            for name, decode in _DECODERS.items()
        },
        "data_wait": waits,
    }


def _write_task(folder: Path, arguments: argparse.Namespace) -> Any:
    shipped = Stream.load("mini_mtil", tasks=[TASK]).tasks[0]
    pictures = ShardDataset(shipped.train, shipped.class_names)
    for index in range(arguments.samples):
        sample = pictures.read(index % len(pictures))
        path = folder / "photos" / f"{sample.label:03d}" / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        sample.images[0].resize(arguments.size, Image.Resampling.BICUBIC).save(path, "JPEG", quality=90)
    for split in ("train", "test"):
        source = open_source(str(folder / "photos"), "folder", SourceOptions())
        convert(source, folder / "shards", ConvertOptions(split=split, shard_samples=100), name="photos")
    return Stream.load(folder / "shards").tasks[0]


def _readers(task: Any, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    transform = train_transform(_preprocess(arguments.input), augment=True)
    loader = TrainLoader(
        [task],
        iterations=arguments.samples // BATCH,
        global_batch_size=BATCH,
        gradient_accumulation_steps=1,
        rank=0,
        world_size=1,
        encoder=PictureEncoder(_preprocess(arguments.input), augment=True),
        seed=0,
        shots=None,
        include_validation=False,
        workers=0,
    )

    def sample(files: dict[str, Any]) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(0)
        return transform(decode_picture(files["jpg"], files["__key__"]), generator), int(files["cls"])

    plain = webdataset.WebDataset([str(shard) for shard in task.train], shardshuffle=False).map(sample)

    def read_plain() -> None:
        images: list[torch.Tensor] = []
        for image, _ in plain:
            images.append(image)
            if len(images) == BATCH:
                torch.stack(images)
                images.clear()

    return {"loader": lambda: [None for _ in loader], "webdataset": read_plain}


def _preprocess(side: int) -> dict[str, Any]:
    return {"size": side, "mean": (0.5,) * 3, "std": (0.3,) * 3, "interpolation": "bicubic"}


def _pil(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def _torchvision(content: bytes) -> np.ndarray:
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    decoded = torchvision.io.decode_jpeg(encoded, mode=torchvision.io.ImageReadMode.RGB)
    return decoded.permute(1, 2, 0).numpy()


def _pil_draft(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    image.draft("RGB", (224, 224))  # the decoder itself leaves pixels out
    return np.asarray(image.convert("RGB"))


_DECODERS = {"pil": _pil, "torchvision": _torchvision, "pil, draft mode": _pil_draft}


def _decoders(task: Any, side: int) -> dict[str, Callable[[], Any]]:
    files = [
        sample["jpg"] for sample in webdataset.WebDataset([str(shard) for shard in task.train], shardshuffle=False)
    ]
    transform = evaluation_transform(_preprocess(side))
    only = {name: lambda f=decode: [f(content) for content in files] for name, decode in _DECODERS.items()}
    whole = {
        f"{name}, transform": lambda f=decode: [transform(Image.fromarray(f(content))) for content in files]
        for name, decode in _DECODERS.items()
    }
    return only | whole


def _equals_pil(decode: Callable[[bytes], np.ndarray]) -> bool:
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((640, 480)).save(file, "JPEG", quality=90)
    return np.array_equal(decode(file.getvalue()), _pil(file.getvalue()))


def _data_wait(folder: Path, steps: int, workers: int) -> float:
    run_dir = folder / f"run-{workers}"
    settings = [f"tasks=[{TASK}]", f"train.iterations={steps}", f"log.every_steps={steps}", f"data.workers={workers}"]
    train(load_config("mini_mtil_dac", [*settings, f"run_dir={run_dir}"]))
    return json.loads((run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])["data_wait"]
