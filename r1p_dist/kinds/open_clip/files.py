"""Whether the files of a CLIP can be there, and whether open_clip has its name."""

import difflib
import importlib.util
import os
from pathlib import Path

from r1p_dist.config import BackboneConfig
from r1p_dist.errors import InputError

_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


def check_files(config: BackboneConfig) -> None:
    """InputError: open_clip has no model of that name, or a folder or file that is named is not there."""
    name, pretrained = config.name, config.pretrained
    if pretrained is not None and (os.sep in pretrained or pretrained.endswith(_WEIGHTS)):
        if not Path(pretrained).is_file():
            raise InputError(f"backbone.pretrained={pretrained}: no such file")
    if name.startswith("local-dir:"):
        if not (Path(name.removeprefix("local-dir:")) / "open_clip_config.json").is_file():
            raise InputError(f"backbone.name={name}: no folder with an open_clip_config.json")
    elif ":" not in name and name != "tiny" and name not in (known := _models()):
        nearest = difflib.get_close_matches(name, ["tiny", *known], n=3)
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        raise InputError(f"backbone.name={name}: open_clip has no such model{hint}")


def model_in(folder: Path) -> str | None:
    return f"local-dir:{folder}" if (folder / "open_clip_config.json").is_file() else None


def _models() -> list[str]:
    """Returns the names of open_clip's models, from its files: importing it takes seconds."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None and spec.origin is not None  # it is required
    return sorted(path.stem for path in (Path(spec.origin).parent / "model_configs").glob("*.json"))
