"""CLIP models of open_clip: pictures and prompts in one space of features."""

from r1p_dist.kinds import Kind

TOWERS = ("image", "text")
LAYERS = ("q", "k", "v", "out", "gate", "fc1", "fc2")  # gate: of gated MLPs

KIND = Kind(
    "open_clip",
    TOWERS,
    default_towers=TOWERS,
    layers=LAYERS,
    even_towers=TOWERS,
    has_answers=False,
    made_from="a CLIP model of open_clip",
    pipeline="zero-shot-image-classification",
    notice="tiny",
    sizes={
        "--prompts": (None, "CLIP: distinct prompts in a micro step (one per picture)"),
        "--prompt-tokens": (32, "CLIP: of the longest prompt (32)"),
    },
    unknown={"attn_implementation": "its towers attend by SDPA"},
    libraries=("open_clip.", "timm.", "transformers.models.clip.", "transformers.models.siglip.", f"{__name__}."),
    has_catalogue=True,
)
