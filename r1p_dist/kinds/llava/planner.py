"""Vision-language models: their micro batch of conversations, their own forward, and what the loss exchanges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from r1p_dist.backbones import LlavaBackbone
from r1p_dist.backbones.conversations import IGNORED, ConversationEncoder
from r1p_dist.config import BackboneConfig, DataConfig, RunConfig
from r1p_dist.data.samples import IMAGE_MARK, BadSampleError, Sample, Turn
from r1p_dist.errors import InputError
from r1p_dist.kinds.llava.shapes import SHAPES
from r1p_dist.kinds.llava.weights import build_on_meta, read_config, read_processor
from r1p_dist.planner.model import ModelShape, attach_method, make_shape
from r1p_dist.planner.network import Collective
from r1p_dist.planner.part import check_size
from r1p_dist.protocol.trainer import Need

_COUNT_BYTES = 8  # int64


@dataclass(frozen=True)
class Conversations:
    """One rank's micro batch: conversations, and what each of them has.

    tokens: with those of its pictures, of the longest. answer_tokens: of them, the ones that carry loss. picture_side:
    of a picture, a square, in pixels. mean_tokens: of all conversations, of a packed batch alone; None: all are as long
    as the longest.
    """

    kind: ClassVar[str] = "llava"
    sample: ClassVar[str] = "conversation"
    conversations: int
    pictures: int
    tokens: int
    answer_tokens: int
    picture_side: int
    mean_tokens: int | None = None

    @property
    def samples(self) -> int:
        return self.conversations

    @property
    def lengths(self) -> list[int]:
        """Tokens of each conversation: the longest, and the others alike."""
        others = self.conversations - 1
        if self.mean_tokens is None or others == 0:
            return self.conversations * [self.tokens]
        share, rest = divmod(self.mean_tokens * self.conversations - self.tokens, others)
        return [self.tokens] + [share + (number < rest) for number in range(others)]

    def __str__(self) -> str:
        mean = "" if self.mean_tokens is None else f", {self.mean_tokens} in the mean and packed"
        return (
            f"{self.conversations} conversations of {self.tokens} tokens{mean}, {self.answer_tokens} of them answers; "
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

    def scan(self, needs: Need, stage: int, ranks: int) -> list[Collective]:
        return self.micro_step(stage, ranks)

    def step(self) -> list[Collective]:
        return [Collective("all_reduce", _COUNT_BYTES, "answer tokens")] if self.is_over_tokens else []


def micro_batch(samples: int, sizes: Mapping[str, int | None]) -> Conversations:
    answers = check_size("--answer-tokens", sizes["--answer-tokens"], 1)
    pictures = check_size("--pictures", sizes["--pictures"], 0)
    side = check_size("--picture-side", sizes["--picture-side"], 1)
    return Conversations(samples, pictures, sizes["--tokens"], answers, side, sizes["--mean-tokens"])


def describe(config: RunConfig, batch: Conversations, dtype: torch.dtype) -> ModelShape:
    return describe_llava(config, build_llava(config.backbone), batch, dtype)


def build_llava(config: BackboneConfig) -> LlavaBackbone:
    """Returns a model on the meta device. InputError: neither a known shape nor a folder of one."""
    name = config.name
    if name != "tiny" and name not in SHAPES and not Path(name).is_dir():
        raise InputError(f"--model {name}: no such folder; use one, or {', '.join(['tiny', *SHAPES])}")
    return LlavaBackbone(build_on_meta(read_config(name)), read_processor(name))


def describe_pictures(
    backbone: LlavaBackbone, data: DataConfig, pictures: int, side: int
) -> tuple[ConversationEncoder, dict[str, Any], torch.Tensor]:
    """Returns a model's encoder, its example of a conversation about square pictures, and their tokens in it, (s,).

    BadSampleError: more pictures than the model takes.
    """
    encoder = backbone.encoder(data)
    picture, turn = Image.new("RGB", (side, side)), Turn("user", IMAGE_MARK * pictures + "?")
    example = encoder.evaluate(Sample("planned", (picture,) * pictures, turns=(turn,)))
    ids = example["input_ids"]
    places = (ids == backbone.config.image_token_id).nonzero().flatten().tolist()
    return encoder, example, ids[places[0] : places[-1] + 1] if places else ids[:0]


def make_conversations(
    encoder: ConversationEncoder,
    example: dict[str, Any],
    seen: torch.Tensor,
    lengths: Sequence[int],
    answer_tokens: int,
) -> dict[str, torch.Tensor]:
    """Returns a training batch of conversations of so many tokens, with content, as code of transformers looks into it:
    grids, masks, crops.

    What `describe_pictures` returns comes first in each; words stand behind it, the last of them the answer.
    """
    word, examples = example["input_ids"][-1:], []
    for length in lengths:
        tokens = torch.cat([seen, word.expand(length - len(seen))])
        prompt_length = length - answer_tokens
        labels = torch.where(torch.arange(length) < prompt_length, IGNORED, tokens)
        examples.append(example | {"input_ids": tokens, "labels": labels, "prompt_length": prompt_length})
    made = encoder.collate(examples)
    made.pop("picture_digests", None)  # of a step in which all pictures are new
    return made


def _planned(config: RunConfig, backbone: LlavaBackbone, batch: Conversations) -> dict[str, torch.Tensor]:
    """Returns a micro batch, packed where the run packs. InputError: as `describe_llava`."""
    try:
        encoder, example, seen = describe_pictures(backbone, config.data, batch.pictures, batch.picture_side)
    except BadSampleError as error:
        raise InputError(f"--pictures {batch.pictures}: {error}") from error
    longest, lowest = backbone.config.text_config.max_position_embeddings, len(seen) + batch.answer_tokens
    what = f"for {batch.pictures} pictures and --answer-tokens {batch.answer_tokens}"
    if not lowest < batch.tokens <= longest:
        raise InputError(
            f"--tokens {batch.tokens}: must be above {lowest}, {what}, and at most the {longest} that "
            f"{config.backbone.name} reads"
        )
    lengths = batch.lengths
    if batch.mean_tokens is not None:
        flag = f"--mean-tokens {batch.mean_tokens}"
        if not config.data.packing:
            raise InputError(f"{flag}: without packing all count as the longest; add data.packing=true or leave it out")
        if batch.conversations == 1:
            raise InputError(f"{flag}: of one conversation; use a --batch above 1 or leave it out")
        if batch.mean_tokens > batch.tokens or min(lengths) <= lowest:
            least = -(-(batch.tokens + (batch.conversations - 1) * (lowest + 1)) // batch.conversations)
            raise InputError(f"{flag}: must be from {least}, {what}, to --tokens {batch.tokens}")
    elif not config.data.packing:
        # all but the first are shorter by one, for those of unlike lengths have a mask
        lengths = [length - (number > 0) for number, length in enumerate(lengths)]
    return make_conversations(encoder, example, seen, lengths, batch.answer_tokens)


def describe_llava(config: RunConfig, backbone: LlavaBackbone, batch: Conversations, dtype: torch.dtype) -> ModelShape:
    """Returns the shape of a backbone on the meta device; it gets the method's adapters.

    InputError: conversations too short for what they shall have, or too long for the model; packing that it cannot.
    """
    example = backbone.prepare(_planned(config, backbone, batch))
    method = attach_method(config, backbone, dtype)

    def forward() -> list[torch.Tensor]:
        return [backbone(example)[0]]

    tower_learns = "image" in config.targets.towers
    keeps = config.backbone.feature_cache_gb > 0 or config.backbone.feature_cache_dir is not None
    loss = Answers(config.train.average_over == "tokens", keeps and not tower_learns)
    return make_shape(method, forward, loss)
