"""Vision-language models of transformers, LLaVA the first of them: a decoder that answers about pictures."""

from r1p_dist.kinds import Kind
from r1p_dist.kinds.llava.shapes import SHAPES

_NAME_SAYS_IT = "a llava model's name says where its weights are"

KIND = Kind(
    "llava",
    towers=("language", "projector", "image"),
    default_towers=("language", "projector"),
    layers=("q", "k", "v", "o", "gate", "up", "down", "fc1", "fc2"),
    even_towers=("language",),  # ranks have unlike numbers of pictures
    has_answers=True,
    made_from="a vision-language model of transformers",
    pipeline="image-text-to-text",
    notice="tiny_llava",
    sizes={
        "--tokens": (700, "VLMs: of the longest conversation, with those of its pictures (700)"),
        "--mean-tokens": (None, "VLMs: of a conversation on average, with data.packing=true alone (as --tokens)"),
        "--answer-tokens": (64, "VLMs: of them, those of answers (64)"),
        "--pictures": (1, "VLMs: of each conversation (1)"),
        "--picture-side": (448, "VLMs: of a picture, a square, in pixels (448)"),
    },
    libraries=("transformers.models.", f"{__name__}."),
    unknown={"pretrained": _NAME_SAYS_IT, "force_quick_gelu": "its activation is that of its files"},
    shapes=tuple(SHAPES),
    model_file="config.json",
)
