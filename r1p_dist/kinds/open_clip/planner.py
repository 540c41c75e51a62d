"""CLIP models: their micro batch, their forward, and what the contrastive loss exchanges."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import open_clip
import torch

from r1p_dist.backbones import ClipBackbone
from r1p_dist.config import BackboneConfig, RunConfig
from r1p_dist.errors import InputError
from r1p_dist.kinds import kind_names, kind_of
from r1p_dist.kinds.open_clip.backbone import build_on_meta, explain_faults
from r1p_dist.kinds.open_clip.towers import HfTextTower
from r1p_dist.kinds.open_clip.weights import model_source
from r1p_dist.planner.model import ModelShape, attach_method, make_shape
from r1p_dist.planner.network import Collective
from r1p_dist.planner.part import check_size
from r1p_dist.protocol.trainer import Need

_FP32 = 4
_LABEL_BYTES = 8  # int64


@dataclass(frozen=True)
class Pictures:
    """One rank's micro batch: pictures, distinct prompts among them, and the tokens of the longest of these."""

    kind: ClassVar[str] = "open_clip"
    sample: ClassVar[str] = "picture"
    pictures: int
    prompts: int
    prompt_tokens: int

    @property
    def samples(self) -> int:
        return self.pictures

    def __str__(self) -> str:
        return f"{self.pictures} pictures and {self.prompts} prompts of {self.prompt_tokens} tokens"


@dataclass(frozen=True)
class Contrast:
    """The loss over the pictures of all ranks. samples: of one rank. width: of a feature.

    trained_towers: whose features have a gradient. is_sigmoid: the sigmoid loss, which needs all pictures' features
    alone, else the contrastive one.
    """

    samples: int
    width: int
    trained_towers: tuple[str, ...]
    is_sigmoid: bool = False

    def bytes(self, ranks: int) -> int:
        """Returns the memory of the loss and its backward at their highest, fp32.

        Of all samples: both towers' gathered features and the gradient of one; of (samples, all samples): targets, two
        matrices of log probabilities, the gradient of one and a temporary. Of the sigmoid loss: one tower's features
        and their gradient; signs, logits, two that log sigmoid keeps, and a gradient.
        """
        everything = ranks * self.samples
        if self.is_sigmoid:
            return _FP32 * (2 * everything * self.width + 5 * self.samples * everything)
        return _FP32 * (3 * everything * self.width + 5 * self.samples * everything)

    def micro_step(self, stage: int, ranks: int) -> list[Collective]:
        """Features are gathered with their labels, pictures' alone for the sigmoid loss; the backward sums the
        gradients of those gathered ones that are trained."""
        features = ranks * self.samples * self.width * _FP32
        towers = ("image",) if self.is_sigmoid else ("image", "text")
        gathers = len(towers) * [Collective("all_gather", features, "features")]
        trained = [tower for tower in towers if tower in self.trained_towers]
        sums = len(trained) * [Collective("reduce_scatter", features, "feature gradients")]
        return [*gathers, *sums, Collective("all_gather", ranks * self.samples * _LABEL_BYTES, "labels")]

    def scan(self, needs: Need, stage: int, ranks: int) -> list[Collective]:
        """The features' own random projection needs none of other ranks; the loss without a backward gathers alone."""
        if needs == "sensitivity":
            return []
        return [collective for collective in self.micro_step(stage, ranks) if collective.kind == "all_gather"]

    def step(self) -> list[Collective]:
        return []


def micro_batch(samples: int, sizes: Mapping[str, int | None]) -> Pictures:
    prompts, tokens = sizes["--prompts"] or samples, sizes["--prompt-tokens"]
    check_size("--prompts", prompts, 1, samples)
    return Pictures(samples, prompts, check_size("--prompt-tokens", tokens, 1))


def describe(config: RunConfig, batch: Pictures, dtype: torch.dtype) -> ModelShape:
    return describe_clip(config, build_clip(config.backbone), batch, dtype)


def build_clip(config: BackboneConfig) -> ClipBackbone:
    """Returns a CLIP model on the meta device. InputError: open_clip has none of that name."""
    source = model_source(config.name)
    if ":" not in source and open_clip.get_model_config(config.name) is None:
        others = [shape for kind in kind_names() for shape in kind_of(kind).shapes]
        known = ["tiny", *open_clip.list_models(), *others]
        nearest = difflib.get_close_matches(config.name, known, n=3)
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        raise InputError(f"--model {config.name}: open_clip has no such model{hint}")
    with explain_faults(config.name, None):
        model = build_on_meta(source, None, config.force_quick_gelu)
    return ClipBackbone(model, open_clip.tokenize, open_clip.get_model_preprocess_cfg(model))


def make_prompts(backbone: ClipBackbone, batch: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns tokens of prompts, (prompts, tokens), and the place (prompts,) of each one's last.

    Masks of transformers' towers depend on the tokens, which have content then: all prompts but the first are shorter
    by one.
    """
    size = (batch.prompts, batch.prompt_tokens)
    tower = backbone.towers["text"]
    if not isinstance(tower, HfTextTower):
        tokens = torch.empty(size, dtype=torch.int64, device="meta")
        return tokens, tokens[:, 0]
    padding = backbone.model.text.config.pad_token_id
    tokens = torch.full(size, padding + 1)
    tokens[1:, -1] = padding
    return tokens, tower.end(tokens)


def describe_clip(config: RunConfig, backbone: ClipBackbone, batch: Pictures, dtype: torch.dtype) -> ModelShape:
    """Returns the shape of a CLIP backbone on the meta device; it gets the method's adapters.

    InputError: more prompt tokens than it reads.
    """
    clip = backbone.model
    context = clip.text.context_length  # some of transformers' have no limit: 0
    if context and batch.prompt_tokens > context:
        raise InputError(
            f"--prompt-tokens {batch.prompt_tokens}: {config.backbone.name} reads {context}; use at most that"
        )
    method = attach_method(config, backbone, dtype)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        size = clip.visual.image_size
        height, width = size if isinstance(size, tuple | list) else (size, size)
        image = torch.empty(batch.pictures, 3, height, width, dtype=dtype, device="meta")
        tokens, end = make_prompts(backbone, batch)
        counts = torch.ones_like(end)
        # by way of the backbone, as DeepSpeed calls it: the first weights are prefetched when it is entered
        return backbone(image, tokens, counts, end)

    # a tower without adapters gives features without gradient
    trained = tuple(dict.fromkeys(adapter.name.partition(".")[0] for adapter in method.adapters))
    loss = Contrast(batch.pictures, clip.text.output_dim, trained, backbone.logit_bias is not None)
    return make_shape(method, forward, loss)
