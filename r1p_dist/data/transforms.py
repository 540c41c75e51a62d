"""From a picture to the backbone's input: open_clip's transforms, with the randomness handed in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from r1p_dist.data.pictures import LONGEST, trim_ends

TrainTransform = Callable[..., torch.Tensor]  # picture, and the generator
EvaluationTransform = Callable[[Image.Image], torch.Tensor]

_SCALE = (0.9, 1.0)  # part of the picture's area
_RATIO = (3 / 4, 4 / 3)  # width / height
_TRIES = 10


def evaluation_transform(preprocess: dict[str, Any]) -> EvaluationTransform:
    """Return open_clip's own evaluation transform: RGB picture -> (3, H, W) float32.

    Of pictures over 64 times as long as thin it sees the centre, all that its crop would leave of them; with the resize
    mode `longest`, which keeps the whole picture, of those that would become thinner than a pixel.
    """
    config = PreprocessCfg(**preprocess)
    transform = image_transform_v2(config, is_train=False)
    if config.resize_mode == "squash":
        return transform
    size = config.size if isinstance(config.size, int) else min(config.size)
    return _Trimmed(transform, size if config.resize_mode == "longest" else LONGEST)


def train_transform(preprocess: dict[str, Any], augment: bool) -> TrainTransform:
    """Return the training transform: (RGB picture, generator) -> (3, H, W) float32; without one, torch's global one.

    With `augment` it is open_clip's: a random crop of 0.9 to 1 of the area, resized bicubic; equal to open_clip's bit
    for bit when the generator has the state of torch's global one. Without, the evaluation transform.
    """
    if augment:
        return _RandomCrop(PreprocessCfg(**preprocess))
    return _Fixed(evaluation_transform(preprocess))


class _Trimmed:
    def __init__(self, transform: EvaluationTransform, most: int) -> None:
        self.transform, self.most = transform, most

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.transform(trim_ends(image, self.most))


class _Fixed:
    def __init__(self, transform: EvaluationTransform) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        return self.transform(image)


class _RandomCrop:
    def __init__(self, preprocess: PreprocessCfg) -> None:
        size = preprocess.size
        self.size = list(size) if isinstance(size, (tuple, list)) else [size, size]
        self.mean, self.std = list(preprocess.mean), list(preprocess.std)

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        top, left, height, width = _sample_crop(image.height, image.width, generator)
        image = F.resized_crop(image, top, left, height, width, self.size, InterpolationMode.BICUBIC)
        return F.normalize(F.to_tensor(image.convert("RGB")), self.mean, self.std)


def _sample_crop(height: int, width: int, generator: torch.Generator | None) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) in pixels, as torchvision's RandomResizedCrop.get_params draws it."""

    # torchvision reads torch's global generator, which would tie a sample's crop to the rank and worker that loads it.
    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(1).uniform_(low, high, generator=generator)

    def place(room: int) -> int:
        return int(torch.randint(0, room + 1, (1,), generator=generator))

    log_ratio = torch.log(torch.tensor(_RATIO)).tolist()
    for _ in range(_TRIES):
        area = height * width * uniform(*_SCALE).item()
        ratio = torch.exp(uniform(*log_ratio)).item()
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return place(height - crop_height), place(width - crop_width), crop_height, crop_width
    # No crop of that shape fits a very long picture: the largest centred one with an allowed ratio.
    crop_width, crop_height = width, height
    if width / height < _RATIO[0]:
        crop_height = round(width / _RATIO[0])
    elif width / height > _RATIO[1]:
        crop_width = round(height * _RATIO[1])
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
