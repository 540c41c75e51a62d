"""A CLIP of open_clip's classes, small enough for a test, with random weights and a tokenizer that needs no
vocabulary."""

import open_clip
import torch

from r1p_dist.backbones import ClipBackbone

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
TEXT = {"context_length": 10, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}
CONFIG = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}


def make_clip(seed: int = 0, layers: int = 2) -> open_clip.model.CustomTextCLIP:
    torch.manual_seed(seed)
    towers = {"vision_cfg": VISION | {"layers": layers}, "text_cfg": TEXT | {"layers": layers}}
    model = open_clip.model.CustomTextCLIP(**CONFIG | towers, nonscalar_logit_scale=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def tokenize(prompts: list[str]) -> torch.Tensor:
    """Start 58, one token per letter, end 59 (the highest), zeros."""
    tokens = torch.zeros(len(prompts), TEXT["context_length"], dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        ids = [58, *(1 + ord(letter) % 50 for letter in prompt[:8]), 59]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def make_backbone(seed: int = 0, layers: int = 2) -> ClipBackbone:
    return ClipBackbone(make_clip(seed, layers), tokenize, {"size": 16})
