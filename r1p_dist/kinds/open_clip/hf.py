"""open_clip's CLIP in the words of transformers' CLIPModel: its configuration, and where each weight goes."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from open_clip.transformer import QuickGELU
from torch import nn
from transformers import CLIPConfig, PreTrainedTokenizerBase

from r1p_dist.errors import InputError
from r1p_dist.export.merged import MergedWeights
from r1p_dist.export.safetensors_writer import Entry
from r1p_dist.kinds.open_clip.frozen_weights import TEMPERATURE
from r1p_dist.kinds.open_clip.towers import is_own_tower

_ARGMAX = 2  # the end token's id that CLIPModel takes for "pool at the highest id of the prompt"
_MODELS = {"visual": "vision_model", "text": "text_model"}
_TOWERS = {"image": "vision_model", "text": "text_model"}
# open_clip's names of weights, and those of transformers' CLIP: within a block, and outside of blocks
BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OUTSIDE_NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text.ln_final.weight": "text_model.final_layer_norm.weight",
    "text.ln_final.bias": "text_model.final_layer_norm.bias",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text.text_projection": "text_projection.weight"}
_LAYERS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


class _Place(NamedTuple):
    """Where a weight of CLIPModel comes from."""

    name: str
    rows: slice | None = None
    is_transposed: bool = False


def hf_module(layer: str) -> str:
    """Returns the module of a CLIPModel that an adapted layer (tower.block.layer) is."""
    tower, block, name = layer.split(".")
    return f"{_TOWERS[tower]}.encoder.layers.{block}.{_LAYERS[name]}"


def hf_entries(weights: MergedWeights, dtype: torch.dtype) -> list[Entry]:
    """Returns the tensors of a CLIPModel's weights file."""

    def read(place: _Place) -> torch.Tensor:
        weight = weights.read(place.name, place.rows)
        return weight.T if place.is_transposed else weight

    entries = []
    for name, place in _places(weights.shapes):
        shape = tuple(weights.shapes[place.name])
        if place.rows is not None:
            shape = (place.rows.stop - place.rows.start, *shape[1:])
        shape = shape[::-1] if place.is_transposed else shape
        entries.append(Entry(name, shape, torch.float32 if name in TEMPERATURE else dtype, partial(read, place)))
    return entries


def _places(shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, _Place]]:
    """Yields each weight of a CLIPModel and where it comes from."""
    for name, shape in shapes.items():
        if name in OUTSIDE_NAMES:
            yield OUTSIDE_NAMES[name], _Place(name)
        elif name in _PROJECTIONS:
            yield _PROJECTIONS[name], _Place(name, is_transposed=True)
        else:
            tower, block, part, kind = re.fullmatch(
                r"(visual|text)\.transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name
            ).groups()
            layer = f"{_MODELS[tower]}.encoder.layers.{block}"
            if part == "attn.in_proj":
                width = shape[0] // 3
                for i, projection in enumerate("qkv"):
                    rows = slice(i * width, (i + 1) * width)
                    yield f"{layer}.self_attn.{projection}_proj.{kind}", _Place(name, rows)
            else:
                yield f"{layer}.{BLOCK_NAMES[part]}.{kind}", _Place(name)


def hf_config(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype) -> CLIPConfig:
    """Returns the configuration of the CLIPModel that computes what an open_clip model (on any device) does.

    model: one that `check_is_clip` takes. tokenizer: the model's, where transformers has it.
    """
    visual, text = model.visual, model.text
    image_shape = {"image_size": visual.image_size[0], "patch_size": visual.patch_size[0]}
    special = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id", None) for token in ("bos", "pad")}
    text_shape = {"vocab_size": text.vocab_size, "max_position_embeddings": text.context_length, **special}
    width = visual.output_dim
    return CLIPConfig(
        vision_config={**_tower(visual.transformer), **image_shape, "projection_dim": width},
        text_config={
            **_tower(text.transformer),
            **text_shape,
            "projection_dim": width,
            "eos_token_id": _end_token(text, tokenizer),
        },
        projection_dim=width,
        architectures=["CLIPModel"],
        dtype=dtype,
    )


def _tower(transformer: nn.Module) -> dict:
    block = transformer.resblocks[0]
    return {
        "hidden_size": block.attn.out_proj.in_features,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "quick_gelu" if isinstance(block.mlp.gelu, QuickGELU) else "gelu",
        "layer_norm_eps": block.ln_1.eps,
    }


def _end_token(text: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Returns the id at whose first place CLIPModel pools, or the one that makes it pool at the highest id."""
    if text.pool_type == "eos":
        return text.eos_id
    end = getattr(tokenizer, "eos_token_id", None)
    return end if end == text.vocab_size - 1 else _ARGMAX  # the highest id of all is the highest of every prompt


def check_is_clip(model: nn.Module) -> None:
    """Raises InputError where CLIPModel cannot express an open_clip model; the message names all that is missing."""
    if missing := list(_missing(model)):
        raise InputError(
            f"backbone: transformers' CLIPModel has no {', no '.join(missing)}; export it with --to open_clip"
        )


def _missing(model: nn.Module) -> Iterator[str]:
    """Yields what a model has and CLIPModel has not."""
    visual, text = model.visual, model.text
    others = [tower for tower, module in (("image", visual), ("text", text)) if not is_own_tower(module)]
    if others:
        yield from (f"{tower} tower of another make than open_clip's own" for tower in others)
        return
    if hasattr(model, "text_decoder"):
        yield "decoder of captions"
    if visual.image_size[0] != visual.image_size[1] or visual.patch_size[0] != visual.patch_size[1]:
        yield "pictures or patches that are not square"
    if visual.attn_pool is not None:
        yield "attentional pooling in the image tower"
    elif visual.pool_type != "tok":
        yield f"pooling {visual.pool_type!r} in the image tower (only the class token's)"
    if isinstance(visual.ln_pre, nn.Identity):
        yield "image tower without a LayerNorm before its blocks"
    if text.cls_emb is not None:
        yield "class token in the text tower"
    elif text.use_pad_mask:
        yield "mask of padding in the text tower"
    elif text.pool_type not in ("argmax", "eos"):
        yield f"pooling {text.pool_type!r} in the text tower (only the end token's)"
    elif text.pool_type == "eos" and text.eos_id == _ARGMAX:
        yield f"end token of id {_ARGMAX} (it takes that for the highest id)"
    if text.attn_mask is None:
        yield "text tower without a causal mask"
    if text.text_projection is None or isinstance(text.text_projection, nn.Linear):
        yield "text projection that is absent or has a bias"
    if visual.output_tokens or text.output_tokens:
        yield "output of tokens beside the features"
    for tower, transformer in (("image", visual.transformer), ("text", text.transformer)):
        block = transformer.resblocks[0]
        if not isinstance(block.ls_1, nn.Identity):
            yield f"layer scale in the {tower} tower"
        if not isinstance(block.mlp.gelu, QuickGELU) and getattr(block.mlp.gelu, "approximate", None) != "none":
            yield f"activation {block.mlp.gelu} in the {tower} tower"
    if getattr(model, "logit_bias", None) is not None:
        yield "bias of the logits"
