"""What a picture looks like to every reader: upright, 8 bits, opaque, the first frame; and thin ones stay small."""

import io

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps

from r1p_dist.data.encoders import PictureEncoder
from r1p_dist.data.pictures import decode_picture, read_picture, trim_ends
from r1p_dist.data.samples import Sample
from r1p_dist.data.transforms import evaluation_transform, train_transform
from r1p_dist.errors import BadSampleError

RAMP = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (16, 1))
TALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 12, 3), dtype=np.uint8))
PREPROCESS = {"size": 24, "mean": (0.5,) * 3, "std": (0.2,) * 3, "interpolation": "bicubic"}


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def seen(content: bytes, *options) -> np.ndarray:
    return np.asarray(read_picture(content, "k", *options).image).astype(int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_phone_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    content = encode(TALL, kind, exif=exif, **options)
    with Image.open(io.BytesIO(content)) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    found = read_picture(content, "k")
    assert found.image.size == ((12, 20) if orientation < 5 else (20, 12))
    assert found.image.tobytes() == expected.tobytes() and found.is_plain == (orientation == 1)
    again = encode(found.image)  # nothing is left that would turn it a second time
    assert read_picture(again, "k").image.tobytes() == expected.tobytes()


def test_damaged_metadata_do_not_cost_the_picture() -> None:
    content = encode(TALL, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff")
    with Image.open(io.BytesIO(encode(TALL, "JPEG"))) as expected:
        assert decode_picture(content, "k").tobytes() == expected.convert("RGB").tobytes()


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "I;16"), ("PPM", "I"), ("TIFF", "I;16"), ("TIFF", "I;16B")])
def test_16_bits_of_grey_become_8_over_the_whole_range(kind: str, mode: str) -> None:
    values = RAMP.astype(np.uint16) * 257
    content = encode(Image.fromarray(values.astype(">u2") if mode == "I;16B" else values), kind)
    found = read_picture(content, "k", ("PNG", "PPM", "TIFF"))
    assert (np.asarray(found.image) == RAMP[..., None]).all() and not found.is_plain


@pytest.mark.parametrize("values", [RAMP.astype(np.int32) * 9999, RAMP.astype(np.float32) / 255])
def test_values_without_a_known_range_are_refused(values: np.ndarray) -> None:
    with pytest.raises(
        BadSampleError, match="k: picture cannot be decoded: its values have 32 bits and no known range"
    ):
        read_picture(encode(Image.fromarray(values), "TIFF"), "k", ("TIFF",))


def test_what_is_transparent_shows_the_background() -> None:
    """Half transparent black on a red ground of 255 is a red of 127 or 128."""
    alpha = np.tile(np.array([[0, 128, 255]], dtype=np.uint8), (4, 1))
    drawing = Image.fromarray(np.dstack([np.zeros((4, 3, 3), np.uint8), alpha]))
    assert seen(encode(drawing))[0, :, 0].tolist() == [255, 127, 0]
    assert seen(encode(drawing), ("PNG",), "red")[0].tolist() == [[255, 0, 0], [127, 0, 0], [0, 0, 0]]
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert seen(encode(palette, transparency=0))[0].tolist() == [[255] * 3, [9] * 3]
    grey = Image.fromarray(np.array([[0, 9]], dtype=np.uint8))
    assert seen(encode(grey, transparency=0))[0].tolist() == [[255] * 3, [9] * 3]
    assert seen(encode(drawing, "WEBP", lossless=True))[0, :, 0].tolist() == [255, 127, 0]


def test_an_opaque_picture_with_an_alpha_channel_stays_as_it_is() -> None:
    found = read_picture(encode(TALL.convert("RGBA")), "k")
    assert found.is_plain and found.image.tobytes() == TALL.tobytes()


def test_kinds_of_pictures_decode_as_their_first_frame() -> None:
    colour = Image.fromarray(np.dstack([RAMP, RAMP // 2, 255 - RAMP]))
    frames = [Image.new("RGB", (32, 16), (value,) * 3) for value in (10, 200)]
    more = {"save_all": True, "append_images": frames[1:]}
    kinds = {
        "CMYK": (encode(colour.convert("CMYK"), "JPEG"), colour, False),
        "palette": (encode(colour.quantize(64)), colour, False),
        "1 bit": (encode(Image.fromarray(RAMP > 127)), Image.fromarray(RAMP > 127), False),
        "LA": (encode(Image.fromarray(RAMP).convert("LA")), Image.fromarray(RAMP), False),
        "MPO": (encode(frames[0], "MPO", **more), frames[0], False),  # a preview is no frame
        "WebP": (encode(frames[0], "WEBP", lossless=True, **more), frames[0], True),
        "APNG": (encode(frames[0], **more), frames[0], True),
    }
    for name, (content, expected, is_animated) in kinds.items():
        found = read_picture(content, name)
        difference = np.asarray(found.image).astype(int) - np.asarray(expected.convert("RGB")).astype(int)
        assert abs(difference).mean() < 8 and found.is_animated == is_animated and found.is_plain, name


def test_a_thin_picture_keeps_its_centre() -> None:
    row = Image.fromarray(np.arange(1001, dtype=np.int32).astype(np.uint8)[None])
    assert list(trim_ends(row, 10).tobytes()) == [value % 256 for value in range(495, 506)]  # odd as before
    column = row.transpose(Image.Transpose.ROTATE_90)
    assert trim_ends(column, 10).size == (1, 11)
    assert trim_ends(row, 1001) is row


@pytest.mark.parametrize("size", [(3000, 1), (1, 2999), (900, 7), (5, 1000)])
def test_a_thin_picture_becomes_what_the_whole_one_would(size: tuple[int, int]) -> None:
    """open_clip resizes the whole picture and keeps its centre; ours may lie half a pixel of the result beside it."""
    x, y = np.meshgrid(np.arange(size[0]) / min(size), np.arange(size[1]) / min(size))
    waves = [np.sin(0.7 * x + 0.3 * y + phase) for phase in (0, 2, 4)]
    picture = Image.fromarray((127 + 120 * np.dstack(waves)).astype(np.uint8))
    expected = image_transform_v2(PreprocessCfg(**PREPROCESS), is_train=False)(picture)
    found = evaluation_transform(PREPROCESS)(picture)
    assert found.shape == (3, 24, 24) and torch.allclose(found, expected, atol=0.1)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (2, 9_999)])
def test_a_thin_picture_of_a_few_bytes_takes_little_memory(resize_mode: str, size: tuple[int, int]) -> None:
    preprocess = PREPROCESS | {"size": 224, "resize_mode": resize_mode}
    encoder = PictureEncoder(preprocess, True)
    sample = Sample("k", (decode_picture(encode(Image.new("RGB", size)), "k"),), label=0)
    resized: list[int] = []
    resize = Image.Image.resize

    def measured(image: Image.Image, size: tuple[int, int], *arguments, **options) -> Image.Image:
        resized.append(size[0] * size[1])
        return resize(image, size, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", measured)
        assert encoder.evaluate(sample)["image"].shape == (3, 224, 224)
        assert encoder.train(sample, torch.Generator().manual_seed(0))["image"].shape == (3, 224, 224)
    assert resized and max(resized) <= 224 * 224 * 65


def test_training_without_augmentation_is_the_evaluation_of_thin_pictures_too() -> None:
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (1, 500, 3), dtype=np.uint8))
    expected = evaluation_transform(PREPROCESS)(picture)
    assert torch.equal(train_transform(PREPROCESS, False)(picture, torch.Generator()), expected)
