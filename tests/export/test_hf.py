"""The transformers export: CLIPModel loads it and computes what the library's own merged model does."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

from r1p_dist.data.transforms import evaluation_transform
from r1p_dist.errors import InputError
from r1p_dist.export import export_run
from r1p_dist.kinds.open_clip.hf_folder import clip_tokenizer, image_processor
from tests.export.fake_run import PROMPTS, SMALL_MODEL, expected_logits, images, library_model, write_model, write_run

VISION, TEXT = SMALL_MODEL["vision_cfg"], SMALL_MODEL["text_cfg"]


def load(folder: Path) -> CLIPModel:
    model, found = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: dict[str, torch.Tensor], pictures: torch.Tensor) -> torch.Tensor:
    return model(**tokens, pixel_values=pictures).logits_per_image


@pytest.mark.parametrize(
    "config",
    [
        None,  # tiny
        SMALL_MODEL,
        SMALL_MODEL | {"quick_gelu": False, "vision_cfg": VISION | {"norm_kwargs": {"eps": 1e-3}}},
        SMALL_MODEL | {"text_cfg": TEXT | {"pool_type": "eos", "eos_id": 49407}},
    ],
    ids=["tiny", "quick gelu", "own eps", "eos"],
)
def test_clip_model_gives_the_same_logits_with_open_clips_tokens_and_with_its_own(tmp_path: Path, config) -> None:
    name = "tiny" if config is None else f"local-dir:{write_model(tmp_path / 'base', config)}"
    run = write_run(tmp_path / "run", [f"backbone.name={name}"])
    folder = export_run(run, "hf")
    model, ours, expected = load(folder), library_model(run, []), expected_logits(run, [0, 1])
    pictures = images(ours)
    logits = logits_of(model, {"input_ids": ours.tokenize(PROMPTS)}, pictures)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    tokens = CLIPProcessor.from_pretrained(folder).tokenizer(
        PROMPTS, padding=True, truncation=True, return_tensors="pt"
    )
    torch.testing.assert_close(logits_of(model, dict(tokens), pictures), expected, atol=1e-4, rtol=0)


def test_a_prompt_pools_at_its_highest_token_where_the_end_token_is_not_known(tmp_path: Path) -> None:
    text = TEXT | {"tokenizer_kwargs": {"clean": "canonicalize"}}
    base = write_model(tmp_path / "base", SMALL_MODEL | {"text_cfg": text})
    run = write_run(tmp_path / "run", [f"backbone.name=local-dir:{base}"])
    folder = export_run(run, "hf")
    model, ours = load(folder), library_model(run, [])
    assert model.config.text_config.eos_token_id == 2
    logits = logits_of(model, {"input_ids": ours.tokenize(PROMPTS)}, images(ours))
    torch.testing.assert_close(logits, expected_logits(run, [0, 1]), atol=1e-4, rtol=0)
    assert not (folder / "tokenizer.json").exists()
    assert "use open_clip's" in (folder / "README.md").read_text()


def test_weights_load_in_the_precision_they_were_exported_in(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    model, ours = load(export_run(run, "hf", dtype="bf16")), library_model(run, [])
    assert model.dtype == torch.bfloat16
    logits = logits_of(model.float(), {"input_ids": ours.tokenize(PROMPTS)}, images(ours))
    torch.testing.assert_close(logits, expected_logits(run, [0, 1]), atol=0.3, rtol=0)


def test_the_tokenizer_has_open_clips_ids() -> None:
    theirs = open_clip.get_tokenizer("ViT-B-32")
    texts = [
        "a photo of a cat.",
        "It's 12 O'Clock, don't they'll?",
        "naïve Überraschung 東京 🎉",
        "",
        "a" * 300,
        "  two  words ",
    ]
    tokens = clip_tokenizer(theirs)(texts, truncation=True, padding="max_length")["input_ids"]
    for ours, ids in zip(tokens, theirs(texts).tolist(), strict=True):
        end = ids.index(theirs.eot_token_id) + 1
        assert ours[:end] == ids[:end] and set(ours[end:]) <= {theirs.eot_token_id}


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_image_processor_prepares_pictures_as_open_clip_does(resize_mode: str, interpolation: str) -> None:
    preprocess = {"size": (32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.1)}
    preprocess |= {"resize_mode": resize_mode, "interpolation": interpolation}
    # of a size whose crop has even margins: else the two libraries' crops are one pixel apart
    smooth = np.linspace(0, 255, 64 * 48 * 3).reshape(64, 48, 3).astype(np.uint8)
    picture = Image.fromarray(smooth)
    config = image_processor(preprocess)
    ours = CLIPImageProcessor.from_dict(config)(picture, return_tensors="pt")["pixel_values"][0]
    expected = evaluation_transform(preprocess)(picture)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 4 / 255 / 0.1  # each library rounds on its own


def test_a_resize_that_transformers_has_not_gives_no_image_processor() -> None:
    preprocess = {"size": (32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    assert image_processor(preprocess | {"resize_mode": "longest"}) is None


@pytest.mark.parametrize(
    ("vision", "text", "more", "missing"),
    [
        ({"ls_init_value": 0.1}, {}, {}, "layer scale in the image tower"),
        ({"attentional_pool": True}, {}, {}, "attentional pooling in the image tower"),
        ({"pool_type": "avg"}, {}, {}, "pooling 'avg' in the image tower"),
        ({"no_ln_pre": True}, {}, {}, "image tower without a LayerNorm before its blocks"),
        ({"image_size": [16, 24]}, {}, {}, "pictures or patches that are not square"),
        ({"act_kwargs": {"approximate": "tanh"}}, {}, {"quick_gelu": False}, "activation .*tanh.* in the image tower"),
        ({}, {"ls_init_value": 0.1}, {}, "layer scale in the text tower"),
        ({}, {"no_causal_mask": True}, {}, "text tower without a causal mask"),
        ({}, {"pool_type": "last"}, {}, "pooling 'last' in the text tower"),
        ({}, {"pool_type": "eos", "eos_id": 2}, {}, "end token of id 2"),
        ({}, {"proj_bias": True}, {"custom_text": True}, "text projection that is absent or has a bias"),
        ({}, {}, {"init_logit_bias": -10.0}, "bias of the logits"),
        ({"pool_type": "avg"}, {"pool_type": "last"}, {}, "pooling 'avg' .*, no pooling 'last'"),
    ],
)
def test_what_clip_model_cannot_express_is_named(tmp_path: Path, vision, text, more, missing) -> None:
    config = SMALL_MODEL | {"vision_cfg": VISION | vision, "text_cfg": TEXT | text} | more
    base = write_model(tmp_path / "base", config)
    run = write_run(tmp_path / "run", [f"backbone.name=local-dir:{base}"])
    with pytest.raises(InputError, match=f"CLIPModel has no .*{missing}.*--to open_clip"):
        export_run(run, "hf")
    assert not (run / "export" / "hf").exists()
    export_run(run, "open_clip")
