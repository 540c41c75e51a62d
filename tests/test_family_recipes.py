"""The recipes of the families of models: each builds its model by shapes alone, with the experts that it asks for."""

import open_clip
import pytest
from transformers import XLMRobertaConfig
from transformers.models.smolvlm import processing_smolvlm

from r1p_dist.adapters import AdaptedLinear
from r1p_dist.kinds.llava.families import FAMILIES
from r1p_dist.kinds.llava.planner import build_llava
from r1p_dist.kinds.llava.shapes import SHAPES
from r1p_dist.kinds.open_clip.planner import build_clip
from r1p_dist.methods import make_method
from r1p_dist.recipes import load_config
from r1p_dist.shipped import shipped_files

# recipe -> the shape of the model that it names, its billions of parameters as published, and its adapted linears
VLMS = {
    "ucit": ("llava-1.5-7b", 7.06, 32 * 7 + 2),
    "ucit_llava_next": ("llava-v1.6-mistral-7b", 7.57, 32 * 7 + 2),
    "ucit_llava_onevision": ("llava-onevision-0.5b", 0.89, 24 * 7 + 2),
    "ucit_qwen2_vl": ("qwen2-vl-2b", 2.21, 28 * 7 + 2),
    "ucit_qwen2_5_vl": ("qwen2.5-vl-3b", 3.75, 36 * 7 + 2),
    "ucit_qwen3_vl": ("qwen3-vl-4b", 4.44, 36 * 7 + 2 * 4),
    "ucit_internvl3": ("internvl3-2b", 2.09, 28 * 7 + 2),
    "ucit_smolvlm2": ("smolvlm2-2.2b", 2.25, 24 * 7 + 1),
    "ucit_idefics3": ("idefics3-8b", 8.46, 32 * 7 + 1),
    "ucit_gemma3": ("gemma-3-4b", 4.30, 34 * 7),
    "ucit_paligemma2": ("paligemma2-3b", 3.03, 26 * 7 + 1),
}
# recipe -> adapted linears of its towers, and whether the loss is the sigmoid one
CLIPS = {
    "mtil_siglip2": (162, 162, True),
    "mtil_eva02": (168, 72, False),
    "mtil_pe_core": (144, 144, False),
    "mtil_mobileclip2": (72, 72, False),
    "mtil_vitamin": (217, 72, False),
    "mtil_convnext": (72, 72, False),
    "mtil_coca": (144, 72, False),
    "mtil_xlm_roberta": (72, 72, False),
}


def test_every_recipe_of_a_family_is_looked_at() -> None:
    families = {name for name in shipped_files("recipes", ".yaml") if name.startswith(("ucit", "mtil_"))}
    assert families == {*VLMS, *CLIPS}


@pytest.mark.parametrize("recipe", VLMS)
def test_a_vision_language_model_gets_its_experts(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # of a package that SmolVLM's processor asks for, though it is videos alone that need it
    monkeypatch.setattr(processing_smolvlm, "num2words", str, raising=False)
    shape, billions, linears = VLMS[recipe]
    config = load_config(recipe)
    words = shape.lower().replace("llava-", "").split("-")
    assert all(word in config.backbone.name.lower() for word in words), "the shape is that of the recipe's model"
    config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"name": shape})})
    backbone = build_llava(config.backbone)
    assert sum(parameter.numel() for parameter in backbone.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
    encoder = backbone.encoder(config.data)  # data.packing is refused where the decoder cannot
    assert (encoder.blank()["input_ids"] == backbone.config.image_token_id).sum() > 0
    adapters = make_method(config, backbone).adapters
    assert len(adapters) == linears and all(isinstance(adapter, AdaptedLinear) for adapter in adapters)


def test_every_family_has_a_shape() -> None:
    assert {shape["model_type"] for shape in SHAPES.values()} == set(FAMILIES)


@pytest.mark.parametrize("recipe", CLIPS)
def test_a_clip_gets_its_experts(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = XLMRobertaConfig(vocab_size=250002, max_position_embeddings=514, type_vocab_size=1)  # on a hub, else
    monkeypatch.setattr(open_clip.hf_model.AutoConfig, "from_pretrained", lambda *_, **__: text)
    image, text_linears, is_sigmoid = CLIPS[recipe]
    config = load_config(recipe)
    name, tag = config.backbone.name, config.backbone.pretrained
    assert tag in open_clip.list_pretrained_tags_by_model(name)
    backbone = build_clip(config.backbone)
    assert (backbone.logit_bias is not None) == is_sigmoid
    adapters = make_method(config, backbone).adapters
    towers = [adapter.name.partition(".")[0] for adapter in adapters]
    assert (towers.count("image"), towers.count("text")) == (image, text_linears)
