"""Vision-language models: their micro batch of conversations, their own forward, and what the loss exchanges."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image

from r1p_dist.backbones import LlavaBackbone
from r1p_dist.backbones.conversations import IGNORED
from r1p_dist.config import BackboneConfig, DataConfig, RunConfig
from r1p_dist.data.samples import IMAGE_MARK, BadSampleError, Sample, Turn
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

    tokens: with those of its pictures, of the longest. answer_tokens: of them, the ones that carry loss. picture_side:
    of a picture, a square, in pixels.
    """

    kind: ClassVar[str] = "llava"
    sample: ClassVar[str] = "conversation"
    conversations: int
    pictures: int
    tokens: int
    answer_tokens: int
    picture_side: int

    @property
    def samples(self) -> int:
        return self.conversations

    def __str__(self) -> str:
        return (
            f"{self.conversations} conversations of {self.tokens} tokens, {self.answer_tokens} of them answers; "
            f"pictures of {self.picture_side} x {self.picture_side} in each: {self.pictures}"
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
    pictures = check_size("--pictures", sizes["--pictures"], 0)
    side = check_size("--picture-side", sizes["--picture-side"], 1)
    return Conversations(samples, pictures, sizes["--tokens"], answers, side)


def describe(config: RunConfig, batch: Conversations, dtype: torch.dtype) -> ModelShape:
    return describe_llava(config, build_llava(config.backbone), batch, dtype)


def build_llava(config: BackboneConfig) -> LlavaBackbone:
    """Returns a model on the meta device. InputError: neither a known shape nor a folder of one."""
    name = config.name
    if name != "tiny" and name not in SHAPES and not Path(name).is_dir():
        raise InputError(f"--model {name}: no such folder; use one, or {', '.join(['tiny', *SHAPES])}")
    return LlavaBackbone(build_on_meta(read_config(name)), read_processor(name))


def make_conversations(name: str, backbone: LlavaBackbone, batch: Conversations) -> dict[str, torch.Tensor]:
    """Returns a micro batch with content, as code of transformers looks into it: grids, masks, crops.

    The model's own processor makes what its pictures become; words stand behind them. All conversations but the first
    are shorter by one, for those of unlike lengths have a mask. InputError: as `describe_llava`.
    """
    longest = backbone.config.text_config.max_position_embeddings
    picture = Image.new("RGB", (batch.picture_side, batch.picture_side))
    turn = Turn("user", IMAGE_MARK * batch.pictures + "?")
    encoder = backbone.encoder(DataConfig())
    try:
        example = encoder.evaluate(Sample("planned", (picture,) * batch.pictures, turns=(turn,)))
    except BadSampleError as error:
        raise InputError(f"--pictures {batch.pictures}: {error}") from error
    ids = example["input_ids"]
    places = (ids == backbone.config.image_token_id).nonzero().flatten().tolist()
    seen = ids[places[0] : places[-1] + 1] if places else ids[:0]
    if not len(seen) + batch.answer_tokens < batch.tokens <= longest:
        raise InputError(
            f"--tokens {batch.tokens}: must be above {len(seen) + batch.answer_tokens}, for {batch.pictures} pictures "
            f"and --answer-tokens {batch.answer_tokens}, and at most the {longest} that {name} reads"
        )
    examples = []
    for length in [batch.tokens] + (batch.conversations - 1) * [batch.tokens - 1]:
        tokens = torch.cat([seen, ids[-1:].expand(length - len(seen))])
        prompt_length = length - batch.answer_tokens
        labels = torch.where(torch.arange(length) < prompt_length, IGNORED, tokens)
        examples.append(example | {"input_ids": tokens, "labels": labels, "prompt_length": prompt_length})
    made = encoder.collate(examples)
    made.pop("picture_digests", None)  # of a step in which all pictures are new
    return made


def describe_llava(config: RunConfig, backbone: LlavaBackbone, batch: Conversations, dtype: torch.dtype) -> ModelShape:
    """Returns the shape of a backbone on the meta device; it gets the method's adapters.

    InputError: conversations too short for what they shall have, or too long for the model.
    """
    example = backbone.prepare(make_conversations(config.backbone.name, backbone, batch))
    adapters = attach_adapters(config, backbone, dtype)

    def forward() -> list[torch.Tensor]:
        return [backbone(example)[0]]

    trace = trace_step(backbone, forward)
    tower_learns = "image" in config.targets.towers
    keeps = config.backbone.feature_cache_gb > 0 or config.backbone.feature_cache_dir is not None
    loss = Answers(config.train.average_over == "tokens", keeps and not tower_learns)
    return make_shape(config, backbone, adapters, trace, loss)
