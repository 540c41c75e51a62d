"""Which frozen weights a run is about: name, tag and a SHA-256 of their file."""

import hashlib
import json
from pathlib import Path

from torch import nn

from r1p_dist.backbones.load import backbone_part
from r1p_dist.config import BackboneConfig
from r1p_dist.files import sha256_of, write_atomically

_SLOW_BYTES = 256 << 20  # from here on a hash takes long enough to be kept


def weights_identity(config: BackboneConfig, model: nn.Module) -> dict[str, str | None]:
    """Returns name, pretrained and sha256 of a backbone that was just loaded.

    The hash is that of the weights file, or of the hashes of several; for random weights that of their names and
    shapes. That of a large file is kept beside it, with the file's size and time.
    """
    hashes = [_kept_sha256(file) for file in backbone_part(config).weights_files(config)] or [_sha256_of_drawing(model)]
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return {"name": config.name, "pretrained": config.pretrained, "sha256": sha256}


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


def _sha256_of_drawing(model: nn.Module) -> str:
    """Random weights are a function of their names and shapes (`draw`)."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(getattr(parameter, 'ds_shape', parameter.shape))}\n".encode())
    return digest.hexdigest()
