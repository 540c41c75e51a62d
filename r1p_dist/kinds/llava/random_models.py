"""Configuration and processor of a shape, which has no files: its family's own classes, the shipped tokenizer."""

from collections.abc import Mapping
from typing import Any

from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from r1p_dist.data.stream import ASSETS
from r1p_dist.kinds.llava.shapes import SHAPES

_QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
_GRID = range(1, 7)  # of the rows and columns that Idefics3 names
_IDEFICS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "end_of_utterance_token": "<end_of_utterance>",
    "global_image_token": "<global-img>",
    "video_token": "<video>",
    **{f"row_{row}_{column}": f"<row_{row}_col_{column}>" for row in _GRID for column in _GRID},
}
# By family: the names by which its processor knows special tokens, and these; and what stands for a picture in a text.
_TOKENS: dict[str, dict[str, str]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), _QWEN),
    **dict.fromkeys(("idefics3", "smolvlm"), _IDEFICS),
    "internvl": {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    },
    "gemma3": {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    },
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
}
_LLAVA = {"image_token": "<image>"}
_MARKS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "<|vision_start|><|image_pad|><|vision_end|>"),
    "internvl": "<IMG_CONTEXT>\\n",
    "gemma3": "<start_of_image>",
}
# Keys of a configuration that name a token, and the token's name in the tables above.
_IDS = {
    "video_token_id": "video_token",
    "vision_start_token_id": "vision_bos_token",
    "vision_end_token_id": "vision_eos_token",
    "boi_token_id": "boi_token",
    "eoi_token_id": "eoi_token",
}


def shape_config(name: str) -> PreTrainedConfig:
    """Returns the configuration of one of SHAPES."""
    return make_config(SHAPES[name])


def make_config(sizes: Mapping[str, Any]) -> PreTrainedConfig:
    """Returns the configuration of a model of some sizes, given as in SHAPES."""
    given = dict(sizes)
    family = given.pop("model_type")
    tokens, tokenizer = _TOKENS.get(family, _LLAVA), _tokenizer(family)
    config = AutoConfig.for_model(family, **{"tie_word_embeddings": False} | given)
    config.image_token_id = tokenizer.convert_tokens_to_ids(tokens.get("image_token") or tokens["context_image_token"])
    for key, token in _IDS.items():
        if token in tokens:
            setattr(config, key, tokenizer.convert_tokens_to_ids(tokens[token]))
    return config


def shape_processor(name: str) -> ProcessorMixin:
    """Returns a processor for one of SHAPES. ImportError: as `make_processor`."""
    return make_processor(shape_config(name))


def make_processor(config: PreTrainedConfig) -> ProcessorMixin:
    """Returns a processor for a model. ImportError: a library that the family's own needs is missing."""
    family, vision = config.model_type, config.vision_config
    tokenizer = _tokenizer(family)
    template = (ASSETS / "tiny_llava" / "chat_template.jinja").read_text(encoding="utf-8")
    common = {"tokenizer": tokenizer, "chat_template": template.replace("<image>\\n", _MARKS.get(family, "<image>\\n"))}
    if family.startswith("qwen"):
        return _of_qwen(family, vision, common)
    side, patch = vision.image_size, vision.patch_size
    size = {"height": side, "width": side}
    if family in ("idefics3", "smolvlm"):
        return _of_crops(family, side, (side // patch // config.scale_factor) ** 2, common)
    if family == "internvl":
        side = side[0]
        size = {"height": side, "width": side}
        pictures = GotOcr2ImageProcessorPil(size=size, min_patches=1, max_patches=12)
        length = int((side // patch[0] * config.downsample_ratio) ** 2)
        video = InternVLVideoProcessor(size=size)
        return InternVLProcessor(pictures, video_processor=video, image_seq_length=length, **common)
    if family == "gemma3":
        return Gemma3Processor(
            Gemma3ImageProcessorPil(size=size), image_seq_length=config.mm_tokens_per_image, **common
        )
    if family == "paligemma":
        pictures = SiglipImageProcessorPil(size=size)
        pictures.image_seq_length = (side // patch) ** 2
        return PaliGemmaProcessor(pictures, tokenizer)  # it has no chat template
    return _of_llava(config, common)


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(
        ASSETS / "tiny_llava",
        extra_special_tokens=_TOKENS.get(family, _LLAVA),
        model_max_length=1 << 20,  # the model says what it takes
    )


def _of_qwen(family: str, vision: PreTrainedConfig, common: dict[str, Any]) -> ProcessorMixin:
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    sizes["temporal_patch_size"] = vision.temporal_patch_size
    made, video = {
        "qwen2_vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor),
        "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
        "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
    }[family]
    return made(Qwen2VLImageProcessorPil(**sizes), video_processor=video(**sizes), **common)


def _of_crops(family: str, side: int, tokens: int, common: dict[str, Any]) -> ProcessorMixin:
    sizes = {"size": {"longest_edge": 4 * side}, "max_image_size": {"longest_edge": side}}
    if family == "idefics3":
        return Idefics3Processor(Idefics3ImageProcessorPil(**sizes), image_seq_len=tokens, **common)
    video = SmolVLMVideoProcessor(size={"longest_edge": side})
    return SmolVLMProcessor(SmolVLMImageProcessorPil(**sizes), video_processor=video, image_seq_len=tokens, **common)


def _of_llava(config: PreTrainedConfig, common: dict[str, Any]) -> ProcessorMixin:
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    common["vision_feature_select_strategy"] = config.vision_feature_select_strategy
    size = {"height": side, "width": side}
    if config.model_type == "llava_onevision":
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=config.image_grid_pinpoints),
            video_processor=LlavaOnevisionVideoProcessor(size=size),
            num_image_tokens=(side // patch) ** 2,
            **common,
        )
    common |= {"patch_size": patch, "num_additional_image_tokens": 1}
    sizes = {"size": {"shortest_edge": side}, "crop_size": size}
    if config.model_type == "llava":
        return LlavaProcessor(CLIPImageProcessorPil(**sizes), **common)
    pictures = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=config.image_grid_pinpoints)
    return LlavaNextProcessor(pictures, **common)
