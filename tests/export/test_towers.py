"""The exports of towers of other makes: plain open_clip loads them; transformers' CLIPModel is refused."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from r1p_dist.errors import InputError
from r1p_dist.export import export_run
from tests.export.fake_run import expected_logits, images, library_model, write_model, write_run
from tests.export.test_open_clip import plain_logits
from tests.small_towers import config_of

VOCABULARY = 49408  # of open_clip's own tokenizer
FAMILIES = ("siglip", "eva01", "eva02", "mobile", "convnext", "roberta", "mt5", "coca")


def make_run(family: str, folder: Path) -> Path:
    config = config_of(family, folder)
    text = config["text_cfg"]
    if "hf_model_name" in text:
        file = Path(text["hf_model_name"]) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": VOCABULARY}))
    else:
        config = config | {"text_cfg": text | {"vocab_size": VOCABULARY}}
    base = write_model(folder / "base", config)
    sizes = ["options.rank=6", "options.active=4", "options.merged=2"]
    return write_run(folder / "run", [f"backbone.name=local-dir:{base}", *sizes])


@pytest.mark.parametrize("family", FAMILIES)
def test_open_clip_loads_the_folder_with_the_same_logits(family: str, tmp_path: Path) -> None:
    run = make_run(family, tmp_path)
    folder = export_run(run, "open_clip")
    model, ours = open_clip.create_model(f"local-dir:{folder}"), library_model(run, [0, 1])
    weights, base = (load_file(at / "open_clip_model.safetensors") for at in (folder, tmp_path / "base"))
    assert weights.keys() == base.keys()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    expected = expected_logits(run, [0, 1])
    if family == "coca":
        model.forward = lambda image, text: (
            model.encode_image(image),
            model.encode_text(text),
            model.logit_scale.exp(),
        )
    elif family == "siglip":
        assert len(model(images(ours), tokenizer(["cat"]))) == 4 and ours.logit_bias == model.logit_bias.item()
        forward = model.forward
        model.forward = lambda image, text: forward(image, text)[:3]
    torch.testing.assert_close(plain_logits(model, tokenizer, images(ours)), expected, atol=1e-4, rtol=1e-5)


def test_statistics_of_batches_are_not_rounded(tmp_path: Path) -> None:
    folder = export_run(make_run("mobile", tmp_path), "open_clip", dtype="bf16")
    weights, base = (load_file(at / "open_clip_model.safetensors") for at in (folder, tmp_path / "base"))
    kept = {name for name in base if "running_" in name or "num_batches" in name}
    assert kept and all(
        weights[name].dtype == base[name].dtype and torch.equal(weights[name], base[name]) for name in kept
    )
    assert weights["text.text_projection"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("siglip", "image tower of another make than open_clip's own"),
        ("roberta", "text tower of another make than open_clip's own"),
        ("coca", "decoder of captions, no attentional pooling in the image tower, no class token in the text tower"),
    ],
)
def test_what_clip_model_has_not_is_named(family: str, missing: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"CLIPModel has no {missing}.*--to open_clip"):
        export_run(make_run(family, tmp_path), "hf")
