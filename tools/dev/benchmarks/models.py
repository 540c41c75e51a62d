"""Models of random weights for measurements: drawn where they are used, and shared between variants of one model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import open_clip
import torch
from torch import nn
from transformers import LlavaConfig

from r1p_dist.backbones import ClipBackbone, LlavaBackbone
from r1p_dist.backbones.conversations import IGNORED
from r1p_dist.config import DataConfig
from r1p_dist.kinds.llava import weights as llava_weights
from r1p_dist.kinds.llava.planner import describe_pictures, make_conversations
from r1p_dist.kinds.llava.random_models import make_config, make_processor
from r1p_dist.kinds.llava.shapes import SHAPES
from r1p_dist.kinds.open_clip.backbone import build_on_meta
from r1p_dist.kinds.open_clip.weights import model_source

CLASSES = ("airplane", "bicycle", "church", "dog", "elephant", "fountain", "guitar", "harbour", "island", "jaguar")
TINY_LLAVA, SMALL_LLAVA = "tiny_llava", "small_llava"
# Of other families that pack and make few tokens of a picture: width, blocks of decoder and tower, vocabulary.
_SCALES = {"tiny": (64, 2, 2, 8000), "small": (256, 8, 4, 16_000)}
_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
OTHERS = tuple(f"{scale}_{family}" for family in _FAMILIES for scale in _SCALES)
LLAVAS = (TINY_LLAVA, SMALL_LLAVA, *OTHERS)
LLAVAS += tuple(name for name, shape in SHAPES.items() if shape["model_type"] == "llava")
# For a CPU; its head is a larger part of it than that of a large model.
_SMALL_TEXT = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 4}
_SMALL_TEXT |= {"model_type": "llama", "vocab_size": 16_000, "num_key_value_heads": 4}
_SMALL_VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
_SMALL_VISION |= {"model_type": "clip_vision_model", "image_size": 112, "patch_size": 14}
TOKENS, ANSWER_TOKENS = 700, 64  # of a conversation with its picture, and of them, those of the answer
_SHORT = {"tiny": (48, 8), "small": (256, 48)}  # beside the picture
_SIDE = 224  # of a picture of other families, in pixels
_STD = 0.02

Weights = Mapping[str, nn.Parameter]


def build(name: str, device: torch.device, dtype: torch.dtype, weights: Weights | None = None):
    """Returns a `ClipBackbone` or `LlavaBackbone` of random weights; name: tiny, one of open_clip, or of LLAVAS.

    weights: those of another such model, which are taken instead of new ones.
    """
    if name in OTHERS:
        config = make_config(_sizes(*name.split("_", 1)))
        backbone = LlavaBackbone(llava_weights.build_on_meta(config), make_processor(config))
    elif name in LLAVAS:
        own = "tiny" if name in (TINY_LLAVA, SMALL_LLAVA) else name
        config = llava_weights.read_config(own)
        if name == SMALL_LLAVA:
            image_token = config.image_token_id
            config = LlavaConfig(text_config=_SMALL_TEXT, vision_config=_SMALL_VISION, tie_word_embeddings=False)
            config.image_token_index = config.image_token_id = image_token
        model = llava_weights.build_on_meta(config)
        backbone = LlavaBackbone(model, llava_weights.read_processor(own))
    else:
        source = model_source(name)
        model = build_on_meta(source, None, False)
        backbone = ClipBackbone(model, open_clip.get_tokenizer(source), open_clip.get_model_preprocess_cfg(model))
    fill(backbone, device, dtype, weights or {})
    return backbone


def _sizes(scale: str, family: str) -> dict[str, Any]:
    """Returns the sizes of a model as in SHAPES: those of a published one of its family, scaled down."""
    published = next(shape for shape in SHAPES.values() if shape["model_type"] == family)
    width, blocks, tower_blocks, vocabulary = _SCALES[scale]
    heads = 4
    text = published["text_config"] | {"hidden_size": width, "num_hidden_layers": blocks, "vocab_size": vocabulary}
    text |= {"intermediate_size": 11 * width // 4, "num_attention_heads": heads, "num_key_value_heads": heads}
    text |= {"head_dim": width // heads, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
    vision: dict[str, Any] = {"hidden_size": width}
    if family == "internvl":
        vision |= {"num_hidden_layers": tower_blocks, "num_attention_heads": heads, "image_size": [_SIDE, _SIDE]}
    else:
        vision |= {"depth": tower_blocks, "num_heads": heads}
        unit = width // heads // 8  # half a head's width is shared out among time, rows and columns
        text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [2 * unit, unit, unit]}
    if family == "qwen2_vl":
        vision["embed_dim"] = width
    else:
        vision["intermediate_size"] = 4 * width
    if family in ("qwen2_5_vl", "qwen3_vl"):
        chosen = "fullatt_block_indexes" if family == "qwen2_5_vl" else "deepstack_visual_indexes"
        vision |= {"out_hidden_size": width, chosen: [0]}
    vision = published["vision_config"] | vision
    return published | {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}


def fill(model: nn.Module, device: torch.device, dtype: torch.dtype, weights: Weights) -> None:
    """Gives a model on the meta device its parameters, those in `weights` by name and the others drawn; all frozen."""
    filled: dict[int, nn.Parameter] = {}  # tied weights stay one
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in filled:
                whole = f"{prefix}.{name}"
                filled[id(parameter)] = weights[whole] if whole in weights else _drawn(name, parameter, device, dtype)
            module._parameters[name] = filled[id(parameter)]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _drawn(name: str, parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    value = torch.empty(parameter.shape, device=device, dtype=dtype)
    is_norm = name == "weight" and parameter.ndim == 1
    value = value.fill_(1) if is_norm else value.zero_() if name.endswith("bias") else value.normal_(0, _STD)
    return nn.Parameter(value, requires_grad=False)


def pictures(backbone: ClipBackbone, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Returns a batch of random pictures of ten classes, on the CPU."""
    return {
        "image": random_images(backbone, count, generator),
        "label": torch.randint(len(CLASSES), (count,), generator=generator),
    }


def random_images(backbone: ClipBackbone, count: int, generator: torch.Generator) -> torch.Tensor:
    size = backbone.preprocess["size"]
    height, width = size if isinstance(size, Sequence) else (size, size)
    return torch.randn(count, 3, height, width, generator=generator)


def conversations(
    backbone: LlavaBackbone, name: str, count: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Returns a batch of random conversations of equal length, each about one picture, on the CPU."""
    beside, answer = _SHORT.get(name.split("_")[0], (None, ANSWER_TOKENS))
    if name in OTHERS:
        return _made_by_its_processor(backbone, count, beside, answer, generator)
    vision, image_token = backbone.config.vision_config, backbone.config.image_token_id
    seen = (vision.image_size // vision.patch_size) ** 2
    seen += backbone.config.vision_feature_select_strategy != "default"  # [CLS] is seen, too
    tokens = TOKENS if beside is None else seen + beside
    ids = torch.randint(image_token + 1, backbone.config.text_config.vocab_size, (count, tokens), generator=generator)
    ids[:, :seen] = image_token
    labels = torch.full_like(ids, IGNORED)
    labels[:, -answer:] = ids[:, -answer:]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "prompt_length": torch.full((count,), tokens - answer),
        "image_counts": torch.ones(count, dtype=torch.int64),
        "pixel_values": torch.randn(count, 3, vision.image_size, vision.image_size, generator=generator),
    }


def _made_by_its_processor(
    backbone: LlavaBackbone, count: int, beside: int, answer_tokens: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Returns such conversations about a black picture, the same for each."""
    encoder, example, seen = describe_pictures(backbone, DataConfig(), 1, _SIDE)
    batch = make_conversations(encoder, example, seen, count * [len(seen) + beside], answer_tokens)
    # no token of them stands for anything but a word
    words = torch.randint(
        len(backbone.processor.tokenizer),
        backbone.config.text_config.vocab_size,
        (count, beside),
        generator=generator,
    )
    batch["input_ids"][:, len(seen) :] = words
    batch["labels"][:, -answer_tokens:] = words[:, -answer_tokens:]
    return batch


def first_blocks(backbone: ClipBackbone | LlavaBackbone) -> Iterator[nn.Module]:
    """Yields the modules whose input needs a gradient where all adapters of the model are trained."""
    if isinstance(backbone, LlavaBackbone):
        yield backbone.model.model.multi_modal_projector
    else:
        yield from (tower.transformer.resblocks[0] for tower in (backbone.model.visual, backbone.model.text))
