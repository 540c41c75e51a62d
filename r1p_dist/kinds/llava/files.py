"""Whether the files of a LLaVA can be there."""

import json
from pathlib import Path

from r1p_dist.config import BackboneConfig
from r1p_dist.errors import InputError
from r1p_dist.kinds.llava import KIND
from r1p_dist.kinds.llava.shapes import SHAPES

_FAMILIES = [shape["model_type"] for shape in SHAPES.values()]


def check_files(config: BackboneConfig) -> None:
    """InputError: the name is neither a folder of a model, nor known, nor like one of a hub."""
    name = config.name
    is_hub_name = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if name == "tiny" or name in KIND.shapes or is_hub_name or (Path(name) / KIND.model_file).is_file():
        return
    known = ", ".join(["tiny", *KIND.shapes])
    raise InputError(f"backbone.name={name}: no folder of a model, with a {KIND.model_file}; known names: {known}")


def model_in(folder: Path) -> str | None:
    try:
        config = json.loads((folder / KIND.model_file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    family = config.get("model_type") if isinstance(config, dict) else None
    return str(folder) if family in _FAMILIES else None
