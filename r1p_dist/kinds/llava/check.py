"""What can be known of a LLaVA before anything heavy is imported."""

from pathlib import Path

from r1p_dist.config import BackboneConfig
from r1p_dist.errors import InputError
from r1p_dist.kinds.llava.shapes import SHAPES


def check(config: BackboneConfig) -> None:
    """InputError: neither a known name, nor a hub's, nor the folder of a model."""
    name = config.name
    is_hub_name = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if name != "tiny" and name not in SHAPES and not is_hub_name and not (Path(name) / "config.json").is_file():
        known = ", ".join(["tiny", *SHAPES])
        raise InputError(f"backbone.name={name}: no folder of a model, with a config.json; known names: {known}")
