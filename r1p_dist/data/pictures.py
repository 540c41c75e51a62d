"""From the bytes of a picture to what every reader of this package sees of it: upright, 8 bits, RGB, without holes.

Training, evaluation and the converter read pictures here alone, so they all see the same pixels:

- The orientation that phones write (EXIF) is applied.
- 16 bits of grey become 8 over the whole range, 65535 becoming 255. 32-bit and floating point values have no known
  range and are refused.
- What is transparent shows the background, white unless another colour is given.
- Of several frames or pages the first one counts.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from r1p_dist.errors import BadSampleError, one_line

SHARD_FORMATS = ("JPEG", "PNG", "WEBP")
BACKGROUND = "white"
LONGEST = 64  # sides to one another, before the shorter one is resized
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Picture(NamedTuple):
    """A decoded picture. is_plain: a reader that only makes it RGB, without our rules, sees the same pixels."""

    image: Image.Image  # RGB
    format: str  # Pillow's name
    is_plain: bool
    is_animated: bool  # there are more frames or pages than the one that was read


def decode_picture(content: bytes, where: str) -> Image.Image:
    """Return a JPEG, PNG or WebP picture as RGB. BadSampleError: damaged, of another kind, or too large to be safe."""
    return read_picture(content, where).image


def read_picture(
    content: bytes, where: str, formats: Sequence[str] = SHARD_FORMATS, background: str = BACKGROUND
) -> Picture:
    """Return a picture of one of Pillow's `formats`. BadSampleError: as `decode_picture`."""
    with _opened(content, where, formats) as image:
        kind, is_animated = image.format, getattr(image, "is_animated", False)
        image.load()  # first, for _orientation passes over errors
        turn = _TURNS.get(_orientation(image))
        upright = image if turn is None else image.transpose(turn)
        plain = _to_8_bits(upright, kind)
        opaque = _fill(plain, background)
        rgb = opaque.convert("RGB")
        rgb.info.clear()  # else an orientation, or a colour that stood for a hole, would be written again
        is_plain = opaque is image
    # A phone's JPEG can have a preview or a depth map behind it (MPO); the picture is the first one.
    return Picture(rgb, "JPEG" if kind == "MPO" else kind, is_plain, is_animated and kind != "MPO")


def trim_ends(image: Image.Image, most: int) -> Image.Image:
    """Return the centre of a picture that is more than `most` times as long as it is thin, else the picture itself.

    A resize of the shorter side makes gigabytes of 20,000 x 1 pixels, of which a centre crop then keeps one square.
    """
    thin, long = sorted(image.size)
    if long <= most * thin:
        return image
    kept = most * thin + (long - most * thin) % 2  # the centre stays where it is
    start = (long - kept) // 2
    is_wide = image.width == long
    return image.crop((start, 0, start + kept, thin) if is_wide else (0, start, thin, start + kept))


@contextmanager
def _opened(content: bytes, where: str, formats: Sequence[str]) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of damaged metadata beside good pixels
            # Half-way to its limit PIL only warns; a training picture of that size is a bomb as well.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=formats) as image:
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSampleError(f"{where}: picture too large to decode safely: {error}") from error
    except UnidentifiedImageError as error:  # its own message names an address in memory
        known = f"no {', '.join(SHARD_FORMATS)} file" if formats == SHARD_FORMATS else "of no format that Pillow reads"
        raise BadSampleError(f"{where}: picture cannot be decoded: {known}") from error
    # PIL's decoders raise many kinds of errors on damaged bytes.
    except Exception as error:
        raise BadSampleError(f"{where}: picture cannot be decoded: {one_line(error)}") from error


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # PIL raises many kinds of errors on damaged metadata, and the pixels are good all the same
        return 1


def _to_8_bits(image: Image.Image, kind: str | None) -> Image.Image:
    """Return the picture itself unless its values have more than 8 bits. ValueError: their range is not known."""
    # Pillow's "I" of a PNG or PPM holds 16 bits.
    if image.mode == "F" or (image.mode == "I" and kind not in ("PNG", "PPM")):
        raise ValueError("its values have 32 bits and no known range; save it with 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;"):
        return image
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _fill(image: Image.Image, background: str) -> Image.Image:
    """Return the picture itself, or where anything of it is transparent, itself before the background."""
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    if layer.getchannel("A").getextrema()[0] == 255:
        return image
    ground = Image.new("RGBA", layer.size, background)
    ground.alpha_composite(layer)
    return ground
