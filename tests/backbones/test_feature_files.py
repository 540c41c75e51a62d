"""Features of pictures in a folder: shared, never of another tower or picture, never more than allowed, never torn."""

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1p_dist.backbones import LlavaBackbone, Placement, load_llava
from r1p_dist.errors import InputError
from r1p_dist.kinds.llava.feature_cache import FeatureCache
from r1p_dist.kinds.llava.feature_files import FeatureFiles
from tests.backbones.test_llava import SAMPLES, picture, talk, training_batch
from tests.small_llava import make_backbone, make_model, make_processor

FEATURES = torch.arange(12.0).reshape(1, 3, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def load(model: Path, cache: Path, **options) -> tuple[LlavaBackbone, list[int]]:
    """Returns a model that keeps features in files alone, and how many pictures its tower looked at, each time."""
    backbone, looks = load_llava(str(model), feature_cache_dir=cache, **options).eval(), []
    backbone.model.model.vision_tower.pre_layrnorm.register_forward_hook(lambda *args: looks.append(len(args[1][0])))
    return backbone, looks


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/??/*") if path.is_file())


@torch.no_grad()
def test_another_run_reads_them_and_computes_what_is_new(model: Path, tmp_path: Path) -> None:
    first, looks = load(model, tmp_path)
    expected = first(training_batch(first))[0]
    second, more_looks = load(model, tmp_path)
    assert torch.equal(second(training_batch(second))[0], expected)
    assert (looks, more_looks) == ([3], []) and len(files_in(tmp_path)) == 3
    plain = load_llava(str(model)).eval()
    assert torch.equal(plain(training_batch(plain))[0], expected)
    # the same picture in another conversation, and another picture in a conversation of the same number
    same = talk("<image>\nagain?", "yes", pictures=(picture(20, 20, 0),), number=70)
    other = talk("<image>\nwhat is this?", "a cat", pictures=(picture(20, 20, 8),), number=1)
    batch = training_batch(second, (same, other))
    torch.testing.assert_close(second(batch)[0], plain(batch)[0])
    assert more_looks == [1] and len(files_in(tmp_path)) == 4


@torch.no_grad()
def test_features_of_another_tower_preparation_or_precision_are_others(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    backbone, _ = load(model, cache)
    backbone(training_batch(backbone))
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in model.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    weights = load_file(changed / "model.safetensors")

    def assert_own_features(options: dict, count: int) -> None:
        backbone, looks = load(changed, cache, **options)
        backbone(training_batch(backbone))
        assert looks == ([3] if count else []) and len(list(cache.glob("*/.bytes"))) == 1 + count

    decoder = next(name for name in weights if name.startswith("language_model") and "mlp" in name)
    save_file(weights | {decoder: weights[decoder] * 2}, changed / "model.safetensors", {"format": "pt"})
    assert_own_features({}, 0)  # the decoder has no part in them
    tower = next(name for name in weights if name.startswith("vision_tower") and "mlp" in name)
    save_file(weights | {tower: weights[tower] * 1.01}, changed / "model.safetensors", {"format": "pt"})
    assert_own_features({}, 1)
    settings = changed / "processor_config.json"
    content = json.loads(settings.read_text(encoding="utf-8"))
    content["image_processor"]["image_std"] = [0.5, 0.5, 0.5]
    settings.write_text(json.dumps(content), encoding="utf-8")
    assert_own_features({}, 2)
    assert_own_features({"placement": Placement(dtype=torch.bfloat16)}, 3)


def test_a_damaged_file_is_none_and_is_mended(tmp_path: Path) -> None:
    files = FeatureFiles(tmp_path, "tower", None)
    files.write("ab12", FEATURES)
    (path,) = files_in(tmp_path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:-1] + b"x", bytes(len(whole))):
        path.write_bytes(damaged)
        assert files.read("ab12") is None
    cache = FeatureCache(0, False, files)
    assert torch.equal(cache.fetch(["ab12"], [1], lambda numbers: FEATURES, torch.device("cpu")), FEATURES)
    assert path.read_bytes() == whole and torch.equal(files.read("ab12"), FEATURES)
    half = FEATURES.bfloat16()
    files.write("ab13", half)
    assert files.read("ab13").dtype == torch.bfloat16 and torch.equal(files.read("ab13"), half)


def test_many_writers_keep_to_one_limit_and_nothing_is_torn(tmp_path: Path) -> None:
    FeatureFiles(tmp_path / "one", "tower", None).write("ab", FEATURES)
    size = files_in(tmp_path / "one")[0].stat().st_size
    folder, limit = tmp_path / "shared", 20 * size + size // 2
    writers = [FeatureFiles(folder, f"tower{number % 2}", limit) for number in range(8)]
    names = [f"{number:04d}" for number in range(16)]

    def write(files: FeatureFiles) -> None:
        for name in names:
            files.write(name, FEATURES + int(name))

    with ThreadPoolExecutor(len(writers)) as threads:
        list(threads.map(write, writers))
    written = files_in(folder)
    assert 10 <= len(written) <= 20 and sum(path.stat().st_size for path in written) <= limit
    for path in written:
        (files,) = (files for files in writers[:2] if files.folder in path.parents)
        assert torch.equal(files.read(path.name), FEATURES + int(path.name))
    assert not list(folder.rglob(".*.*")), "a temporary file is left"


def test_a_full_disk_and_a_folder_of_others(tmp_path: Path, monkeypatch, caplog) -> None:
    files = FeatureFiles(tmp_path / "cache", "tower", None)

    def refuse(*args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    for name in ("ab12", "cd34"):
        files.write(name, FEATURES)
    assert len(caplog.records) == 1 and "No space left on device; no more features are kept" in caplog.text
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"backbone.feature_cache_dir=.*file: cannot be written to: .*name a folder"):
        FeatureFiles(tmp_path / "file", "tower", None)


def test_a_tower_whose_own_weights_learn_is_looked_at_each_time(tmp_path: Path) -> None:
    backbone = make_backbone(cache_bytes=1 << 20, files=FeatureFiles(tmp_path, "tower", None))
    weights = backbone.tower_parameters(["image"]).values()
    for weight in weights:
        weight.requires_grad_(True)
    backbone(training_batch(backbone))[0].sum().backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in weights)
    assert not files_in(tmp_path) and not backbone._cache._kept
    assert backbone(training_batch(backbone, SAMPLES[2:]))[0].requires_grad
