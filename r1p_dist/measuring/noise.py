"""Pairs that show nothing, in place of data like those of a backbone's pretraining: noise and made-up words."""

from collections.abc import Iterator

import torch
from PIL import Image

from r1p_dist.data import Sample

_SIZE = 224
_WORDS, _SYLLABLES = 8, 3  # words of a text, and syllables of a word at most


def noise_pairs(count: int) -> Iterator[tuple[Sample, str]]:
    """Yields `count` pairs of a picture and a text; a pair is a function of its number."""
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        yield Sample(f"{number:06d}", (_picture(generator),)), _text(generator)


def _picture(generator: torch.Generator) -> Image.Image:
    """Returns coloured noise, (224, 224) RGB: each plane's amplitudes fall with a power of the frequency.

    A photograph's fall with about the first power (Field 1987); power, colours and contrast are drawn.
    """
    power, contrast = _between(0.6, 1.6, generator), _between(20, 70, generator)
    noise = torch.randn(3, _SIZE, _SIZE, generator=generator)
    frequency = torch.hypot(torch.fft.fftfreq(_SIZE)[:, None], torch.fft.rfftfreq(_SIZE)[None])
    frequency[0, 0] = 1 / _SIZE
    planes = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency**power, s=(_SIZE, _SIZE))
    planes = (planes - planes.mean((1, 2), keepdim=True)) / planes.std((1, 2), keepdim=True)
    colours = torch.einsum("cp,phw->hwc", torch.randn(3, 3, generator=generator), planes)
    mean = 60 + 140 * torch.rand(3, generator=generator)
    values = mean + contrast * colours / colours.std()
    return Image.fromarray(values.clamp(0, 255).round().byte().numpy())


def _text(generator: torch.Generator) -> str:
    """Returns words of random syllables, which a tokenizer cuts into whatever pieces it has."""
    return " ".join(_word(generator) for _ in range(_WORDS))


def _word(generator: torch.Generator) -> str:
    count = int(torch.randint(1, _SYLLABLES + 1, (), generator=generator))
    return "".join(_letter("bcdfghjklmnprstvwz", generator) + _letter("aeiou", generator) for _ in range(count))


def _letter(letters: str, generator: torch.Generator) -> str:
    return letters[int(torch.randint(len(letters), (), generator=generator))]


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
