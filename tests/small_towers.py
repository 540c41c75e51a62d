"""CLIPs of every make of towers, small enough for a test, with random weights: image towers of timm, text towers of
transformers, a CoCa, and models with a sigmoid loss."""

import json
from pathlib import Path

import open_clip
import torch
from timm.models import register_model
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.fastvit import FastVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vitamin import GeGluMlp, HybridEmbed, MbConvStages, VitCfg
from torch import nn

from r1p_dist.backbones import ClipBackbone
from tests.small_clip import CONFIG, TEXT, tokenize

WIDTH = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 16}
HEAD = {"timm_model_pretrained": False, "image_size": 16, "timm_proj": None}
SIGMOID = {"init_logit_bias": -10.0, "init_logit_scale": 2.3}
SIGLIP_TEXT = TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
# a configuration of transformers each, as a text tower's folder has it
OF_TRANSFORMERS = {
    "roberta": {
        **{"model_type": "roberta", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0},
        **{"num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 16},
    },
    "bert": {
        **{"model_type": "bert", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0},
        **{"num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 16},
    },
    "mt5": {
        **{"model_type": "mt5", "vocab_size": 60, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2},
        **{"num_decoder_layers": 1, "num_heads": 2, "pad_token_id": 0},
    },
    "m2m_100": {
        **{"model_type": "m2m_100", "vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
        **{"max_position_embeddings": 16, "pad_token_id": 0},
    },
}


def _timm(pretrained: bool, model: type[nn.Module], sizes: dict, given: dict) -> nn.Module:
    """What timm's own builders do beside: a configuration of the pretrained weights, which there are none of."""
    given = {key: value for key, value in given.items() if key in ("global_pool", "num_classes")}
    built = model(**sizes | given)
    built.default_cfg = built.pretrained_cfg = {"pool_size": None}
    return built


@register_model
def small_siglip(pretrained=False, **given):
    return _timm(pretrained, VisionTransformer, WIDTH | {"class_token": False, "global_pool": "map"}, given)


@register_model
def small_eva01(pretrained=False, **given):
    """Fused projections whose biases are of their own, and a norm behind each part of a block."""
    return _timm(pretrained, Eva, WIDTH | {"use_post_norm": True, "global_pool": "token"}, given)


@register_model
def small_eva02(pretrained=False, **given):
    """Separate projections, a gated MLP with a norm in it, and rotary positions."""
    own = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "use_rot_pos_emb": True}
    return _timm(pretrained, Eva, WIDTH | own | {"ref_feat_shape": (2, 2), "global_pool": "token"}, given)


@register_model
def small_pe(pretrained=False, **given):
    own = {"attn_type": "rope", "use_pre_transformer_norm": True, "use_rot_pos_emb": True, "global_pool": "map"}
    return _timm(pretrained, Eva, WIDTH | own | {"ref_feat_shape": (2, 2), "attn_pool_num_heads": 2}, given)


@register_model
def small_vitamin(pretrained=False, **given):
    embed = VitCfg(embed_dim=(8, 16, 32), depths=(1, 1, 1), stem_width=8, head_type="1d")
    embed.conv_cfg.norm_layer, embed.conv_cfg.norm_eps = "layernorm2d", 1e-6

    def hybrid(**options):
        return HybridEmbed(MbConvStages(embed), proj=False, **{**options, "patch_size": 1})

    own = {"class_token": False, "global_pool": "avg", "mlp_layer": GeGluMlp, "embed_layer": hybrid, "img_size": 32}
    return _timm(pretrained, VisionTransformer, WIDTH | own, given)


@register_model
def small_convnext(pretrained=False, **given):
    return _timm(pretrained, ConvNeXt, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "patch_size": 2}, given)


@register_model
def small_mobile(pretrained=False, **given):
    """Convolutions with statistics of batches, and attention in the last part."""
    own = {"layers": (1, 1), "token_mixers": ("repmixer", "attention"), "embed_dims": (32, 64), "mlp_ratios": (2, 2)}
    own |= {"downsamples": (False, True), "se_downsamples": (False, True), "pos_embs": (None, None)}
    return _timm(pretrained, FastVit, own, given)


def _of_timm(name: str, pool: str, **own) -> dict:
    return CONFIG | {"vision_cfg": HEAD | {"timm_model_name": name, "timm_pool": pool} | own}


def _of_transformers(name: str, folder: Path) -> dict:
    at = folder / name
    at.mkdir(parents=True, exist_ok=True)
    (at / "config.json").write_text(json.dumps(OF_TRANSFORMERS[name]))
    pooler = "mean_pooler" if name in ("roberta", "mt5") else "cls_pooler"
    text = {"hf_model_name": str(at), "hf_proj_type": "mlp", "hf_pooler_type": pooler}
    return CONFIG | {"text_cfg": text | {"context_length": TEXT["context_length"]}}


def config_of(family: str, folder: Path) -> dict:
    """Returns open_clip's configuration of a family; the text tower's own is written into the folder."""
    if family in OF_TRANSFORMERS:
        return _of_transformers(family, folder)
    coca = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    coca_text = TEXT | {"embed_cls": True, "output_tokens": True, "vocab_size": 60}
    return {
        "siglip": _of_timm("small_siglip", "map", timm_proj="none")
        | SIGMOID
        | {"embed_dim": 32, "text_cfg": SIGLIP_TEXT},
        "eva01": _of_timm("small_eva01", "token"),
        "eva02": _of_timm("small_eva02", "token"),
        "pe": _of_timm("small_pe", "map"),
        "vitamin": _of_timm("small_vitamin", "", timm_proj="linear", image_size=32),
        "convnext": _of_timm("small_convnext", "", timm_proj="linear", image_size=32),
        "mobile": _of_timm("small_mobile", "avg", image_size=32),
        "coca": CONFIG
        | {"vision_cfg": CONFIG["vision_cfg"] | coca, "text_cfg": coca_text}
        | {"multimodal_cfg": {"context_length": 10, "vocab_size": 60, "width": 24, "heads": 2, "layers": 1}},
    }[family] | {"custom_text": True}


FAMILIES = ("siglip", "eva01", "eva02", "pe", "vitamin", "convnext", "mobile", *OF_TRANSFORMERS, "coca")


def make_model(family: str, folder: Path, seed: int = 0) -> nn.Module:
    """Returns an open_clip model with random weights, biases and statistics."""
    torch.manual_seed(seed)
    config = dict(config_of(family, folder))
    config.pop("custom_text", None)
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"] = config["text_cfg"] | {"hf_model_pretrained": False}
    model = kind(**config, nonscalar_logit_scale=True)
    for name, parameter in model.named_parameters():
        if name.startswith(("visual", "text.")) and parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, std=0.1)
        elif name.endswith(("gamma", "trunk.head.weight")):  # timm begins with next to nothing
            nn.init.normal_(parameter, std=1.0)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    return model


def make_backbone(family: str, folder: Path, seed: int = 0) -> ClipBackbone:
    return ClipBackbone(make_model(family, folder, seed), tokenize, {"size": 16})


def pictures(family: str, count: int, seed: int = 0) -> torch.Tensor:
    size = 32 if family in ("vitamin", "convnext", "mobile") else 16
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
