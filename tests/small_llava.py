"""LLaVA-style models of transformers, small enough for a test, with random weights and a tokenizer of bytes."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from r1p_dist.backbones import LlavaBackbone

SIZE = {"height": 16, "width": 16}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 272}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<video>"]
GRID = [[16, 32], [32, 16]]
TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message.role == 'user' else 'ASSISTANT:' if message.role == 'assistant' else '' }}"
    "{% for part in message.content %}{{ '<image>\n' if part.type == 'image' else ' ' + part.text }}{% endfor %}"
    "{{ '</s>' if message.role == 'assistant' else ' ' }}"
    "{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt else '' }}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, behind the special ones."""
    return byte_tokenizer(SPECIAL, {"image_token": "<image>", "video_token": "<video>"})


def byte_tokenizer(
    special: list[str], named: dict[str, str], merges: Sequence[tuple[str, str]] = ()
) -> PreTrainedTokenizerFast:
    """One token per byte and per merge, behind the special ones; named: those of them that a processor asks for."""
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(vocabulary)}, merges=[*merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=named,
    )


def make_processor(family: str = "llava", side: int = 16, patch: int = 8) -> ProcessorMixin:
    """side, patch: pixels of a picture and of its patches, of the family `llava` alone."""
    common = {"tokenizer": make_tokenizer(), "chat_template": TEMPLATE, "image_token": "<image>"}
    pictures = {"size": {"shortest_edge": 16}, "crop_size": SIZE}
    if family == "llava":
        return LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
            patch_size=patch,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            **common,
        )
    if family == "llava_next":
        return LlavaNextProcessor(
            LlavaNextImageProcessorPil(**pictures, image_grid_pinpoints=GRID),
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            **common,
        )
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=SIZE, image_grid_pinpoints=GRID),
        video_processor=LlavaOnevisionVideoProcessor(size=SIZE),
        video_token="<video>",
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        **common,
    )


def make_model(family: str = "llava", seed: int = 0) -> torch.nn.Module:
    text = {"model_type": "llama", **TEXT}
    torch.manual_seed(seed)
    if family == "llava_onevision":
        vision = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}
        config = LlavaOnevisionConfig(vision_config=vision, text_config=text, image_grid_pinpoints=GRID)
        config.image_token_id, config.video_token_id = 3, 4
        model = LlavaOnevisionForConditionalGeneration(config)
    else:
        vision = {"model_type": "clip_vision_model", "projection_dim": 16, **VISION}
        if family == "llava_next":
            config = LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=GRID)
            config.image_token_id = 3
            model = LlavaNextForConditionalGeneration(config)
        else:
            config = LlavaConfig(vision_config=vision, text_config=text)
            config.image_token_id = 3
            model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():  # spread out, so that no test passes by values near zero
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model


def make_backbone(family: str = "llava", seed: int = 0, **options) -> LlavaBackbone:
    return LlavaBackbone(make_model(family, seed), make_processor(family), **options)
