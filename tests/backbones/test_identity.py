"""Which weights a run is about: the hash of their file, kept beside a large one, or of the numbers."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from r1p_dist.backbones import identity
from r1p_dist.config import BackboneConfig
from r1p_dist.data.stream import ASSETS
from tests.small_clip import make_clip


def test_the_shipped_model_has_its_files_hash() -> None:
    file = ASSETS / "tiny/open_clip_model.safetensors"
    found = identity.weights_identity(BackboneConfig(), make_clip())
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert found == {"name": "tiny", "pretrained": None, "sha256": expected}
    assert not file.with_name(f"{file.name}.sha256.json").exists(), "a small file is hashed in no time"


def test_the_hash_of_a_large_file_is_kept_by_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_SLOW_BYTES", 0)
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"one")
    config = BackboneConfig(name="ViT-B-16", pretrained=str(file))
    hashed = []
    monkeypatch.setattr(identity, "sha256_of", lambda path: hashed.append(path) or hashlib.sha256(b"x").hexdigest())
    first = identity.weights_identity(config, make_clip())
    assert identity.weights_identity(config, make_clip()) == first and hashed == [file]
    kept = file.with_name("weights.safetensors.sha256.json")
    assert json.loads(kept.read_text())["bytes"] == 3
    file.write_bytes(b"other")
    identity.weights_identity(config, make_clip())
    assert len(hashed) == 2
    for content in ("", "{", "[]", "{}"):
        kept.write_text(content)
        identity.weights_identity(config, make_clip())
    assert len(hashed) == 6, "a damaged note is not believed"


def test_random_weights_are_known_by_the_names_and_shapes_that_they_are_drawn_from() -> None:
    config = BackboneConfig(name="ViT-B-16")
    model, same = make_clip(0), make_clip(0)
    found = identity.weights_identity(config, model)
    assert found == identity.weights_identity(config, same)
    model.register_parameter("further", torch.nn.Parameter(torch.zeros(1)))
    assert found != identity.weights_identity(config, model)
