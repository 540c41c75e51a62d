"""Vision-language models of transformers beside LLaVA, small enough for a test, with random weights and processors.

Pictures of unlike sizes become unlike numbers of patches, crops or tokens.
"""

import inspect

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
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
from transformers.models.smolvlm import processing_smolvlm

from r1p_dist.backbones import LlavaBackbone
from tests.small_llava import SIZE, TEMPLATE, TEXT, VISION, byte_tokenizer

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "internvl", "gemma3", "paligemma")
# Of PaliGemma 2's logits; older transformers leave it out of their own loss.
CAP = 3.0 if "softcapping" in inspect.getsource(PaliGemmaForConditionalGeneration.forward) else None
# The name by which a processor knows a token, and the token.
_TOKENS = {
    "qwen": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    },
    "idefics3": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
        "video_token": "<video>",
        **{f"row_{row}_{column}": f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)},
    },
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
    "paligemma": {"image_token": "<image>"},
}
_MARKS = {"qwen": "<|vision_start|><|image_pad|><|vision_end|>", "idefics3": "<image>"}
_MARKS |= {"internvl": "<IMG_CONTEXT>\n", "gemma3": "<start_of_image>"}
_PATCHES = {**VISION, "patch_size": 4}
_QWEN_TOWER = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _group(family: str) -> str:
    return "qwen" if family.startswith("qwen") else "idefics3" if family == "smolvlm" else family


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token per byte but for lines between paragraphs, behind the special ones."""
    named = _TOKENS[_group(family)]
    return byte_tokenizer(["<pad>", "<s>", "</s>", *named.values()], named, [("Ċ", "Ċ")])


def make_processor(family: str) -> ProcessorMixin:
    group = _group(family)
    if group == "paligemma":
        pictures = SiglipImageProcessorPil(size=SIZE)
        pictures.image_seq_length = 16
        return PaliGemmaProcessor(pictures, make_tokenizer(family))  # it has no chat template
    common = {
        "tokenizer": make_tokenizer(family),
        "chat_template": TEMPLATE.replace("<image>\n", _MARKS[group].replace("\n", "\\n")),
    }
    if group == "qwen":
        size = {"shortest_edge": 8 * 8, "longest_edge": 24 * 24}
        patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": size}
        made, video = {
            "qwen2_vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor),
            "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
            "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
        }[family]
        return made(Qwen2VLImageProcessorPil(**patches), video_processor=video(**patches), **common)
    if group == "idefics3":
        sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
        if family == "idefics3":
            return Idefics3Processor(Idefics3ImageProcessorPil(**sizes), image_seq_len=4, **common)
        # of a package that writes a video's number of frames in words; asked for where there is no video, too
        processing_smolvlm.num2words = str
        video = SmolVLMVideoProcessor(size={"longest_edge": 16}, num_frames=2, fps=1)
        return SmolVLMProcessor(SmolVLMImageProcessorPil(**sizes), video_processor=video, image_seq_len=4, **common)
    if group == "internvl":
        video = InternVLVideoProcessor(size=SIZE)
        pictures = GotOcr2ImageProcessorPil(size=SIZE, crop_to_patches=True, min_patches=1, max_patches=4)
        return InternVLProcessor(pictures, video_processor=video, image_seq_length=4, **common)
    return Gemma3Processor(Gemma3ImageProcessorPil(size=SIZE), image_seq_length=4, **common)


def make_config(family: str) -> AutoConfig:
    tokenizer = make_tokenizer(family)
    text, ids = dict(TEXT), {}
    if _group(family) == "qwen":
        names = ("image_token", "video_token", "vision_bos_token", "vision_eos_token")
        image, video, start, end = (tokenizer.convert_tokens_to_ids(_TOKENS["qwen"][name]) for name in names)
        ids = {"image_token_id": image, "video_token_id": video}
        ids |= {"vision_start_token_id": start, "vision_end_token_id": end}
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
        vision = dict(_QWEN_TOWER)
        if family == "qwen2_vl":
            vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        else:
            vision |= {"hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 32}
        if family == "qwen2_5_vl":
            vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        if family == "qwen3_vl":
            vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
            text["head_dim"] = 8
    elif _group(family) == "idefics3":
        ids = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "scale_factor": 2}
        vision, text = dict(_PATCHES), {"model_type": "llama", **text}
    elif family == "internvl":
        ids = {"image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), "downsample_ratio": 0.5}
        vision, text = {**_PATCHES, "image_size": [16, 16], "patch_size": [4, 4]}, {"model_type": "qwen2", **text}
    elif family == "paligemma":
        ids = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "projection_dim": 32}
        vision = {"model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 32, **_PATCHES}
        text |= {"model_type": "gemma2", "head_dim": 8, "sliding_window": 24, "final_logit_softcapping": CAP}
        text["query_pre_attn_scalar"] = 8
    else:
        ids = {"image_token_id": tokenizer.convert_tokens_to_ids("<image_soft_token>"), "mm_tokens_per_image": 4}
        ids |= {"boi_token_id": tokenizer.convert_tokens_to_ids("<start_of_image>")}
        ids |= {"eoi_token_id": tokenizer.convert_tokens_to_ids("<end_of_image>")}
        vision = {"model_type": "siglip_vision_model", "vision_use_head": False, **_PATCHES}
        # a window shorter than the conversations of the tests
        text |= {"head_dim": 8, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
    return AutoConfig.for_model(family, vision_config=vision, text_config=text, tie_word_embeddings=False, **ids)


def make_model(family: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(make_config(family))
    for parameter in model.parameters():  # spread out, so that no test passes by values near zero
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model


def make_backbone(family: str, seed: int = 0, **options) -> LlavaBackbone:
    return LlavaBackbone(make_model(family, seed), make_processor(family), **options)
