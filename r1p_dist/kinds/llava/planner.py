"""LLaVA-style models: their micro batch of conversations, their own forward, and what the loss exchanges."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from r1p_dist.backbones import LlavaBackbone
from r1p_dist.backbones.conversations import IGNORED
from r1p_dist.config import BackboneConfig, RunConfig
from r1p_dist.errors import InputError
from r1p_dist.kinds.llava.shapes import SHAPES
from r1p_dist.kinds.llava.weights import build_on_meta, read_config, read_processor
from r1p_dist.planner.model import ModelShape, attach_adapters, make_shape
from r1p_dist.planner.network import Collective
from r1p_dist.planner.part import check_size
from r1p_dist.planner.trace import trace_step

_COUNT_BYTES = 8  # int64


@dataclass(frozen=True)
class Conversations:
    """One rank's micro batch: conversations, and what each of them has.

    tokens: with those of its pictures, as long as the longest. answer_tokens: of them, the ones that carry loss.
    """

    kind: ClassVar[str] = "llava"
    sample: ClassVar[str] = "conversation"
    conversations: int
    pictures: int
    tokens: int
    answer_tokens: int

    @property
    def samples(self) -> int:
        return self.conversations

    def __str__(self) -> str:
        return (
            f"{self.conversations} conversations of {self.tokens} tokens, {self.answer_tokens} of them answers; "
            f"pictures in each: {self.pictures}"
        )


@dataclass(frozen=True)
class Answers:
    """The cross entropy of answer tokens, each rank's by itself.

    is_over_tokens: the mean is one over all ranks' tokens, as with train.average_over=tokens. has_cache: pictures'
    features are kept, and under ZeRO-3 all ranks must agree to run the image tower.
    """

    is_over_tokens: bool
    has_cache: bool

    def bytes(self, ranks: int) -> int:
        """Returns 0: the cross entropy is part of the forward."""
        return 0

    def micro_step(self, stage: int, ranks: int) -> list[Collective]:
        asks = self.has_cache and stage == 3
        return [Collective("all_reduce", _COUNT_BYTES, "pictures not kept")] if asks else []

    def step(self) -> list[Collective]:
        return [Collective("all_reduce", _COUNT_BYTES, "answer tokens")] if self.is_over_tokens else []


def micro_batch(samples: int, sizes: Mapping[str, int | None]) -> Conversations:
    answers = check_size("--answer-tokens", sizes["--answer-tokens"], 1)
    return Conversations(samples, check_size("--pictures", sizes["--pictures"], 0), sizes["--tokens"], answers)


def describe(config: RunConfig, batch: Conversations, dtype: torch.dtype) -> ModelShape:
    return describe_llava(config, build_llava(config.backbone), batch, dtype)


def build_llava(config: BackboneConfig) -> LlavaBackbone:
    """Returns a LLaVA model on the meta device. InputError: neither a known shape nor a folder of one."""
    name = config.name
    if name != "tiny" and name not in SHAPES and not Path(name).is_dir():
        raise InputError(f"--model {name}: no such folder; use one, or {', '.join(['tiny', *SHAPES])}")
    model_config = read_config(name)
    if model_config.model_type != "llava":
        raise InputError(
            f"--model {name}: is of type {model_config.model_type}; the planner counts the type llava alone, use "
            "dry-run, which takes real steps of any type"
        )
    return LlavaBackbone(build_on_meta(model_config), read_processor(name))


def describe_llava(config: RunConfig, backbone: LlavaBackbone, batch: Conversations, dtype: torch.dtype) -> ModelShape:
    """Returns the shape of a LLaVA backbone on the meta device; it gets the method's adapters.

    InputError: conversations too short for what they shall have, or too long for the model.
    """
    model, vision = backbone.config, backbone.config.vision_config
    side = vision.image_size // vision.patch_size
    seen = batch.pictures * (side**2 + (model.vision_feature_select_strategy != "default"))  # the [CLS] token is seen
    longest = model.text_config.max_position_embeddings
    if not seen + batch.answer_tokens < batch.tokens <= longest:
        raise InputError(
            f"--tokens {batch.tokens}: must be above {seen + batch.answer_tokens}, for {batch.pictures} pictures and "
            f"--answer-tokens {batch.answer_tokens}, and at most the {longest} that {config.backbone.name} reads"
        )
    adapters = attach_adapters(config, backbone, dtype)

    ids = torch.full((batch.conversations, batch.tokens), model.image_token_id + 1)
    ids[:, :seen] = model.image_token_id
    labels = ids.clone()
    labels[:, : -batch.answer_tokens] = IGNORED
    count, size = max(1, batch.conversations * batch.pictures), vision.image_size
    example = backbone.prepare(
        {
            "input_ids": ids,
            "labels": labels,
            # as conversations of unlike lengths have; with four dimensions it is not looked into
            "attention_mask": torch.empty(
                batch.conversations, 1, batch.tokens, batch.tokens, dtype=torch.bool, device="meta"
            ),
            "prompt_length": torch.full((batch.conversations,), batch.tokens - batch.answer_tokens),
            "image_counts": torch.full((batch.conversations,), batch.pictures),
            "pixel_values": torch.empty(count, vision.num_channels, size, size, device="meta"),
        }
    )

    def forward() -> list[torch.Tensor]:
        return [backbone(example)[0]]

    trace = trace_step(backbone, forward)
    tower_learns = "image" in config.targets.towers
    keeps = config.backbone.feature_cache_gb > 0 or config.backbone.feature_cache_dir is not None
    loss = Answers(config.train.average_over == "tokens", keeps and not tower_learns)
    return make_shape(config, backbone, adapters, trace, loss)
