"""Pairs of a picture and its caption, read from the archives that both small models learn from."""

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

IMAGE_SIZE = 64


def read_training_pairs(folder: Path) -> tuple[torch.Tensor, list[str], list[str]]:
    """Returns `read_pairs` of the training archives."""
    return read_pairs(sorted(folder.glob("pairs-*.tar")) + sorted(folder.glob("extra-*.tar.gz")))


def read_held_out_pairs(folder: Path) -> tuple[torch.Tensor, list[str], list[str]]:
    """Returns `read_pairs` of the held-out archives."""
    return read_pairs(sorted(folder.glob("val-*.tar")))


def read_pairs(files: list[Path]) -> tuple[torch.Tensor, list[str], list[str]]:
    """Returns the pictures, uint8 (n, 3, 64, 64), their captions and their keys, in the order of the keys."""
    images: dict[str, np.ndarray] = {}
    captions: dict[str, str] = {}
    for file in files:
        with tarfile.open(file) as tar:
            for member in tar:
                key, suffix = member.name.rsplit(".", 1)
                content = tar.extractfile(member).read()
                if suffix == "txt":
                    captions[key] = content.decode().strip()
                else:
                    images[key] = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    if images.keys() != captions.keys():
        raise SystemExit(f"pairs without picture or caption: {sorted(images.keys() ^ captions.keys())[:5]}")
    keys = sorted(captions)
    pixels = torch.from_numpy(np.stack([images[key] for key in keys])).permute(0, 3, 1, 2).contiguous()
    return pixels, [captions[key] for key in keys], keys


def without_tags(caption: str) -> str:
    """Returns the caption without the tags that icon sets append: `taxi: cab, car` and `taxi (cab)` become `taxi`."""
    return re.sub(r"\s*\([^)]*\)$|: .*$", "", caption).strip() or caption


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Returns pictures with values in [0, 1] as CLIP's towers expect them."""
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    return (images - mean) / std
