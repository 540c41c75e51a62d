"""Which frozen weights a run is about: name, tag and a SHA-256 of their numbers' file."""

import hashlib
import json
from importlib import resources
from pathlib import Path

import open_clip
import torch
from torch import nn

from r1p_dist.config import BackboneConfig
from r1p_dist.files import sha256_of, write_atomically

_SLOW_BYTES = 256 << 20  # from here on a hash takes long enough to be kept


def weights_identity(config: BackboneConfig, model: nn.Module) -> dict[str, str | None]:
    """Returns name, pretrained and sha256 of a backbone that was just loaded, before any sharding or cast.

    The hash is that of the weights file; of the numbers themselves where there is none (random weights). That of a
    large file is kept beside it, with the file's size and time.
    """
    file = weights_file(config)
    sha256 = _sha256_of_numbers(model) if file is None else _kept_sha256(file)
    return {"name": config.name, "pretrained": config.pretrained, "sha256": sha256}


def weights_file(config: BackboneConfig) -> Path | None:
    """Returns the file that a backbone's weights come from; None for random weights and where it is not known."""
    folder = None
    if config.name == "tiny":
        folder = Path(str(resources.files("r1p_dist") / "assets" / "tiny"))
    elif config.name.startswith("local-dir:"):
        folder = Path(config.name.removeprefix("local-dir:"))
    if folder is not None:
        found = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
        return found[0] if found else None
    if config.pretrained is None or ":" in config.name:
        return None
    if Path(config.pretrained).is_file():
        return Path(config.pretrained)
    # loaded a moment ago, so this only looks it up
    return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(config.name, config.pretrained)))


def _kept_sha256(file: Path) -> str:
    facts = {"bytes": file.stat().st_size, "mtime_ns": file.stat().st_mtime_ns}
    if facts["bytes"] < _SLOW_BYTES:
        return sha256_of(file)
    kept = file.with_name(f"{file.name}.sha256.json")
    try:
        content = json.loads(kept.read_text(encoding="utf-8"))
        if {key: content[key] for key in facts} == facts:
            return content["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    sha256 = sha256_of(file)
    try:
        write_atomically(kept, json.dumps({**facts, "sha256": sha256}))
    except OSError:
        pass  # a folder of others: hash again next time
    return sha256


def _sha256_of_numbers(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
