"""Published sizes of models without weights, to try out what a cluster can hold: one or more of each family.

A shape is what its config.json says of sizes; the rest is transformers' default. Vocabularies are as large as
published; the tokens are those of the shipped tokenizer (random_models.py).
"""

from typing import Any

_SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
_SO400M_OF_CROPS = {key: size for key, size in _SIGLIP_SO400M.items() if key not in ("model_type", "vision_use_head")}


def _decoder(
    kind: str, layers: int, width: int, hidden: int, heads: tuple[int, int], vocabulary: int, **own: Any
) -> dict:
    """heads: of queries, and of keys and values."""
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        **own,
    }


def _qwen25(layers: int, width: int, hidden: int, heads: tuple[int, int], vocabulary: int, is_tied: bool) -> dict:
    text = _decoder("qwen2_5_vl_text", layers, width, hidden, heads, vocabulary, tie_word_embeddings=is_tied)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": width}
    return {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision, "tie_word_embeddings": is_tied}


SHAPES: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}},
    "llava-1.5-13b": {
        "model_type": "llava",
        "text_config": _decoder("llama", 40, 5120, 13824, (40, 40), 32064),
    },
    "llava-v1.6-mistral-7b": {
        "model_type": "llava_next",
        "text_config": _decoder("mistral", 32, 4096, 14336, (32, 8), 32064, sliding_window=None),
    },
    "llava-onevision-0.5b": {
        "model_type": "llava_onevision",
        "text_config": _decoder("qwen2", 24, 896, 4864, (14, 2), 152000),
        "vision_config": {**_SIGLIP_SO400M, "num_hidden_layers": 26, "image_size": 384},
        "tie_word_embeddings": True,
    },
    "qwen2-vl-2b": {
        "model_type": "qwen2_vl",
        "text_config": _decoder(
            *("qwen2_vl_text", 28, 1536, 8960, (12, 2), 151936),
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        ),
        "vision_config": {"embed_dim": 1280, "hidden_size": 1536},
        "tie_word_embeddings": True,
    },
    "qwen2.5-vl-3b": _qwen25(36, 2048, 11008, (16, 2), 151936, is_tied=True),
    "qwen2.5-vl-7b": _qwen25(28, 3584, 18944, (28, 4), 152064, is_tied=False),
    "qwen3-vl-4b": {
        "model_type": "qwen3_vl",
        "text_config": _decoder(
            *("qwen3_vl_text", 36, 2560, 9728, (32, 8), 151936),
            head_dim=128,
            rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        ),
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "out_hidden_size": 2560,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        "tie_word_embeddings": True,
    },
    "internvl3-2b": {
        "model_type": "internvl",
        "text_config": _decoder("qwen2", 28, 1536, 8960, (12, 2), 151674),
        "vision_config": {"attention_bias": True},
        "tie_word_embeddings": False,
    },
    "smolvlm2-2.2b": {
        "model_type": "smolvlm",
        "text_config": _decoder("llama", 24, 2048, 8192, (32, 32), 49280, max_position_embeddings=8192),
        "vision_config": {**_SO400M_OF_CROPS, "image_size": 384},
        "scale_factor": 3,
        "tie_word_embeddings": False,
    },
    "idefics3-8b": {
        "model_type": "idefics3",
        "text_config": _decoder("llama", 32, 4096, 14336, (32, 8), 128259, max_position_embeddings=131072),
        "vision_config": {**_SO400M_OF_CROPS, "image_size": 364},
        "tie_word_embeddings": False,
    },
    "gemma-3-4b": {
        "model_type": "gemma3",
        "text_config": _decoder("gemma3_text", 34, 2560, 10240, (8, 4), 262208, sliding_window=1024),
        "vision_config": {**_SIGLIP_SO400M, "image_size": 896},
        "mm_tokens_per_image": 256,
        "tie_word_embeddings": True,
    },
    "paligemma2-3b": {
        "model_type": "paligemma",
        "text_config": _decoder("gemma2", 26, 2304, 9216, (8, 4), 257216, head_dim=256),
        "vision_config": {**_SIGLIP_SO400M, "image_size": 224, "projection_dim": 2304},
        "projection_dim": 2304,
        "tie_word_embeddings": True,
    },
}
