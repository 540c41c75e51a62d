"""Models of random weights for measurements: drawn where they are used, and shared between variants of one model."""

from collections.abc import Iterator, Mapping, Sequence

import open_clip
import torch
from torch import nn
from transformers import LlavaConfig

from r1p_dist.backbones import ClipBackbone, LlavaBackbone
from r1p_dist.backbones.conversations import IGNORED
from r1p_dist.kinds.llava import weights as llava_weights
from r1p_dist.kinds.llava.shapes import SHAPES
from r1p_dist.kinds.open_clip.backbone import build_on_meta
from r1p_dist.kinds.open_clip.weights import model_source

CLASSES = ("airplane", "bicycle", "church", "dog", "elephant", "fountain", "guitar", "harbour", "island", "jaguar")
TINY_LLAVA, SMALL_LLAVA = "tiny_llava", "small_llava"
LLAVAS = (TINY_LLAVA, SMALL_LLAVA, *(name for name, shape in SHAPES.items() if shape["model_type"] == "llava"))
# For a CPU; its head is a larger part of it than that of a large model.
_SMALL_TEXT = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 4}
_SMALL_TEXT |= {"model_type": "llama", "vocab_size": 16_000, "num_key_value_heads": 4}
_SMALL_VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
_SMALL_VISION |= {"model_type": "clip_vision_model", "image_size": 112, "patch_size": 14}
TOKENS, ANSWER_TOKENS = 700, 64  # of a conversation with its picture, and of them, those of the answer
_SHORT = {TINY_LLAVA: (48, 8), SMALL_LLAVA: (256, 48)}  # beside the picture
_STD = 0.02

Weights = Mapping[str, nn.Parameter]


def build(name: str, device: torch.device, dtype: torch.dtype, weights: Weights | None = None):
    """Returns a `ClipBackbone` or `LlavaBackbone` of random weights; name: tiny, one of open_clip, or of LLAVAS.

    weights: those of another such model, which are taken instead of new ones.
    """
    if name in LLAVAS:
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
    vision, image_token = backbone.config.vision_config, backbone.config.image_token_id
    seen = (vision.image_size // vision.patch_size) ** 2
    seen += backbone.config.vision_feature_select_strategy != "default"  # [CLS] is seen, too
    tokens, answer = (seen + _SHORT[name][0], _SHORT[name][1]) if name in _SHORT else (TOKENS, ANSWER_TOKENS)
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


def first_blocks(backbone: ClipBackbone | LlavaBackbone) -> Iterator[nn.Module]:
    """Yields the modules whose input needs a gradient where all adapters of the model are trained."""
    if isinstance(backbone, LlavaBackbone):
        yield backbone.model.model.multi_modal_projector
    else:
        yield from (tower.transformer.resblocks[0] for tower in (backbone.model.visual, backbone.model.text))
