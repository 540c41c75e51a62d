"""Transforms: equal to open_clip's own, and a function of the generator handed in."""

import io

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from r1p_dist.data.transforms import evaluation_transform, train_transform
from tests.data.toy_task import picture

PREPROCESS = {"size": 24, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic"}


def image(size: tuple[int, int]) -> Image.Image:
    return Image.open(io.BytesIO(picture(1, size))).convert("RGB")


# The last ones are so long that no allowed crop fits.
@pytest.mark.parametrize("size", [(64, 64), (50, 61), (5, 7), (1, 1), (300, 20), (12, 200)])
def test_training_equals_open_clips_own_transform(size: tuple[int, int]):
    theirs = image_transform_v2(PreprocessCfg(**PREPROCESS), is_train=True)
    ours = train_transform(PREPROCESS, True)
    for seed in range(8):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = theirs(image(size))
        assert torch.equal(ours(image(size), torch.Generator().manual_seed(seed)), expected)


def test_training_varies_with_the_generator_only():
    transform = train_transform(PREPROCESS, True)
    before = torch.get_rng_state()
    first, again, other = (transform(image((40, 40)), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_without_augmentation_it_is_open_clips_evaluation_transform(resize_mode: str):
    preprocess = PREPROCESS | {"resize_mode": resize_mode, "interpolation": "bilinear"}
    expected = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)(image((50, 31)))
    assert expected.shape == (3, 24, 24)
    assert torch.equal(evaluation_transform(preprocess)(image((50, 31))), expected)
    assert torch.equal(train_transform(preprocess, False)(image((50, 31)), torch.Generator()), expected)
