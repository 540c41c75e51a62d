"""LLaVA-style models of transformers: image tower, projector, language model; the loss on answers, and generation.

Legend: n conversations of t tokens in a batch, m pictures in it, c crops of all pictures (one each, but where the
family cuts large pictures), d widths of the parts.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from r1p_dist.adapters import AdaptedLinear, LowRankLinear, Routing
from r1p_dist.adapters.pool import vote_ahead
from r1p_dist.backbones.compiling import compile_blocks
from r1p_dist.backbones.conversations import IGNORED, ConversationEncoder
from r1p_dist.backbones.recompute import checkpoint_forward
from r1p_dist.backbones.slots import Slot, fill
from r1p_dist.backbones.weights import Placement, place
from r1p_dist.config import BackboneConfig, DataConfig, TrainConfig
from r1p_dist.data import Stream
from r1p_dist.data.samples import BLANK
from r1p_dist.distributed import sum_over_ranks, world_size
from r1p_dist.errors import InputError
from r1p_dist.kinds.llava.feature_cache import FeatureCache
from r1p_dist.kinds.llava.weights import (
    build_on_meta,
    files_of_weights,
    map_weights,
    model_folder,
    read_config,
    read_processor,
)

Batch = dict[str, torch.Tensor]
_ATTENTION = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
_LAYERS = {
    "language": {
        **_ATTENTION,
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    "projector": {"fc1": "linear_1", "fc2": "linear_2"},
    "image": {**_ATTENTION, "o": "self_attn.out_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
}


class Layout(NamedTuple):
    """The pictures of a batch of conversations, as the host must know them."""

    counts: list[int]  # pictures of each conversation
    crops: list[int]  # of each picture; a batch without any has a blank one
    pictures: list[tuple[int, int]] | None  # (sample, number within it) of each, where samples have numbers


class LlavaBackbone(nn.Module):
    """A LLaVA-style model, frozen, with its processor.

    forward(batch) returns the cross entropy (k,) of the batch's k answer tokens and the conversation (k,) of each;
    forward(batch, max_new_tokens) generates, greedily: (n, up to max_new_tokens) token ids. A batch is what
    `ConversationEncoder.collate` returns, or `prepare` makes of it, with the samples' numbers under "sample" where
    features are to be kept.

    The guide `cls_image` of a conversation is the vector [CLS; p]: the mean over its pictures of the image tower's
    [CLS] (in the layer that the projector reads; of the whole picture where there are crops; the mean of all tokens
    where the projector sees all of them, which towers without [CLS] need), and zeros; for a conversation without
    pictures zeros, and the mean of the input embeddings of its prompt. The projector's pictures vote one by one, by the
    same vector of their own.
    """

    kind = "llava"

    def __init__(self, model: nn.Module, processor: ProcessorMixin, cache_bytes: int = 0, is_sharded: bool = False):
        """cache_bytes: of features of a tower without adapters, 0: none. is_sharded: by ZeRO-3."""
        super().__init__()
        self.model = model.requires_grad_(False)
        self.processor, self.is_sharded = processor, is_sharded
        config, parts = model.config, model.model
        self.tower_width, self.width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.routing = {
            "language": Routing(guide_width=self.tower_width + self.width),
            "projector": Routing(guide_width=self.tower_width),
            "image": Routing(),
        }
        self._cache = FeatureCache(cache_bytes, is_sharded)
        self._pictures: list[tuple[int, int]] | None = None  # of the batch that the tower looks at
        self._crops: list[int] = []
        # transformers would put its hooks in later, and an engine takes away all hooks that came in its time
        maybe_install_capturing_hooks(parts.vision_tower)
        parts.vision_tower.forward = partial(self._look, parts.vision_tower.forward)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    def slots(self, towers: Sequence[str], layers: Sequence[str]) -> Iterator[Slot]:
        """Yields the linears that can have adapters, tower by tower, block by block.

        InputError: a block that is built otherwise.
        """
        parts = self.model.model
        blocks = {
            "language": parts.language_model.layers,
            "projector": [parts.multi_modal_projector],
            "image": self._seen_blocks() if "image" in towers else (),
        }
        for tower in towers:
            for number, block in enumerate(blocks[tower]):
                for layer, path in _LAYERS[tower].items():
                    if layer in layers:
                        yield _slot(tower, number, layer, block, path)

    def _seen_blocks(self) -> Sequence[nn.Module]:
        """Returns the image tower's blocks up to the last one whose output the projector reads."""
        blocks = self.model.model.vision_tower.encoder.layers
        # hidden state 0 is the input of block 0
        return blocks[: max(layer % (len(blocks) + 1) for layer in self._read_layers)]

    @property
    def _read_layers(self) -> list[int]:
        """The hidden states of the image tower that the projector reads."""
        read = self.config.vision_feature_layer
        return [read] if isinstance(read, int) else list(read)

    def attach(
        self, make: Callable[[Slot, Routing], LowRankLinear], towers: Sequence[str], layers: Sequence[str]
    ) -> list[LowRankLinear]:
        """Puts `make(slot, routing)` on its linears; returns the adapters in the order of `slots`."""
        return fill(list(self.slots(towers, layers)), self.routing, make)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that forward reads from modules that it does not call."""
        newline = getattr(self.model.model, "image_newline", None)
        return [] if newline is None else [newline]

    def compile_blocks(self) -> None:
        """Compiles the training forward of the language model's blocks; before `checkpoint_blocks`."""
        compile_blocks(self.model.model.language_model.layers)

    def checkpoint_blocks(self) -> None:
        """Makes every block run its forward again in the backward instead of keeping its activations."""
        for block in [*self.model.model.vision_tower.encoder.layers, *self.model.model.language_model.layers]:
            checkpoint_forward(block)

    def check(self, stream: Stream) -> None:
        """Raises InputError for a stream that has no conversations, before any training."""
        if not stream.tasks[0].is_instruction:
            raise InputError(
                f"stream={stream.path}: has classes, backbone.kind=llava learns conversations (tasks with a `metric`); "
                "use backbone.kind=open_clip or another stream"
            )

    def encoder(self, data: DataConfig) -> ConversationEncoder:
        """Returns what makes batches of samples; pictures are taken as they are, without augmentation."""
        return ConversationEncoder(
            self.processor,
            self.config.image_token_id,
            self.config.text_config.max_position_embeddings,
            is_blind=data.blind,
        )

    def tower_parameters(self, towers: Sequence[str]) -> dict[str, nn.Parameter]:
        """Returns the weights of towers by their names in `named_parameters`; the language model's with its head."""
        parts = {"image": ("vision_tower.",), "projector": ("multi_modal_projector.",)}
        parts["language"] = ("language_model.", "lm_head.")
        wanted = tuple(part for tower in towers for part in parts[tower])
        return {name: p for name, p in self.named_parameters() if any(f".{part}" in f".{name}" for part in wanted)}

    def preparer(self, prompts: Sequence[str]) -> Callable[[Batch], Batch]:
        """Returns `prepare`: a conversation brings its prompt along."""
        return self.prepare

    def prepare(self, batch: Batch) -> Batch:
        """Returns a micro batch of n conversations with what the host knows of its k answer tokens and m pictures.

        "answers" (k,): the places, in the flattened batch, of the tokens before them; "owner" (k,): the conversation of
        each; "answer_counts" (n,); "layout": a `Layout`; "whole" (m,): the crop that shows all of a picture, and
        "picture_owner" (m,): the conversation of each picture.
        """
        is_answer = F.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
        answers, layout = is_answer.flatten().nonzero().flatten(), self._layout(batch)
        crops, counts = torch.tensor(layout.crops), torch.tensor(layout.counts)
        return batch | {
            "answers": answers,
            "owner": answers // is_answer.shape[1],
            "answer_counts": is_answer.sum(1),
            "layout": layout,
            "whole": (crops.cumsum(0) - crops)[: sum(layout.counts)],
            "picture_owner": torch.arange(len(counts)).repeat_interleave(counts),
        }

    def begin_step(self, batches: Sequence[Batch], train: TrainConfig) -> None:
        """Gives each conversation of an optimizer step's micro batches its "weight" (n,), the factor of its tokens.

        The mean over ranks and micro batches of the weighted sums is then the mean over all answer tokens of the
        global batch, or over its conversations of their means; a collective for tokens.
        """
        counts = [batch["answer_counts"] for batch in batches]
        if train.average_over == "samples":
            for batch, count in zip(batches, counts, strict=True):
                batch["weight"] = 1 / (len(count) * count.float())
            return
        total = sum_over_ranks(torch.stack([count.sum() for count in counts]).sum())
        for batch, count in zip(batches, counts, strict=True):
            batch["weight"] = (world_size() * len(batches) / total.float()).expand(len(count))

    def loss(self, model: Callable, batch: Batch) -> torch.Tensor:
        """Returns this rank's part of the loss of a micro batch that `prepare` and `begin_step` have seen.

        model: this backbone, or the DeepSpeed engine around it.
        """
        losses, conversations = model(batch)
        return (losses * batch["weight"][conversations]).sum()

    def outputs(self, model: Callable, batch: Batch) -> list[torch.Tensor]:
        """Returns the logits of each token of the answers, (tokens, vocabulary)."""
        return [model(batch, gives_logits=True)]

    def answer(self, model: Callable, batch: Batch, max_new_tokens: int) -> list[tuple[str, bool]]:
        """Returns the text that the model answers to each conversation of a batch, and whether it came to an end."""
        ids = model(batch, max_new_tokens=max_new_tokens).tolist()
        texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [(text.strip(), not set(self._ends).isdisjoint(row)) for text, row in zip(texts, ids, strict=True)]

    def forward(
        self, batch: Batch, max_new_tokens: int | None = None, gives_logits: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        embeddings = self.model.get_input_embeddings()(batch["input_ids"])
        if max_new_tokens is None and "layout" not in batch:
            batch = self.prepare(batch)
        layout = batch.get("layout") or self._layout(batch)
        features = torch.cat(self._see(batch, layout)).to(embeddings.dtype)
        if any(layout.counts):
            places = (batch["input_ids"] == self.config.image_token_id)[..., None].expand_as(embeddings)
            seen = embeddings.masked_scatter(places, features)
        else:
            seen = embeddings + 0 * features.sum()  # every rank's backward goes through the same layers
        mask = batch["attention_mask"]
        if max_new_tokens is not None:
            return self.model.generate(
                inputs_embeds=seen,
                attention_mask=mask,
                generation_config=self._generation(max_new_tokens),
                synced_gpus=self.is_sharded and world_size() > 1,
            )
        self._prepare_routing(batch, embeddings)
        hidden = self.model.model.language_model(inputs_embeds=seen, attention_mask=mask, use_cache=False)[0]
        answers = batch["answers"]
        logits = self.model.lm_head(hidden.flatten(0, 1)[answers])  # of the tokens that count alone
        if gives_logits:
            return logits
        losses = F.cross_entropy(logits.float(), batch["labels"].flatten()[answers + 1], reduction="none")
        return losses, batch["owner"]

    @cached_property
    def _ends(self) -> list[int]:
        """The tokens that end an answer."""
        given = self.model.generation_config.eos_token_id
        given = self.processor.tokenizer.eos_token_id if given is None else given
        return given if isinstance(given, list) else [given]

    def _generation(self, max_new_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._ends,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )

    def _layout(self, batch: Batch) -> Layout:
        """Returns how many pictures and crops a batch has, and whose they are; the host waits for a device."""
        counts = batch["image_counts"].tolist()
        crops = [1] * len(batch["pixel_values"])
        per_sample = [count for count in counts if count] or [1]
        if "image_sizes" in batch:
            alone = [count == 1 or self.config.model_type == "llava_next" for count in per_sample for _ in range(count)]
            crops = [
                image_size_to_num_patches(size, self.config.image_grid_pinpoints, self.config.vision_config.image_size)
                if is_cut
                else 1
                for size, is_cut in zip(batch["image_sizes"].tolist(), alone, strict=True)
            ]
        pictures = None
        if "sample" in batch:
            owners = batch["sample"].tolist() if any(counts) else [BLANK]
            pictures = [
                (owner, number)
                for owner, count in zip(owners, counts if any(counts) else [1], strict=True)
                for number in range(count)
            ]
        return Layout(counts, crops, pictures)

    def _see(self, batch: Batch, layout: Layout) -> list[torch.Tensor]:
        """Returns the projected tokens (tokens, d) of each picture of the batch, and notes their [CLS]."""
        pixels = batch["pixel_values"].to(self.model.get_input_embeddings().weight.dtype)
        options: dict[str, Any] = {}
        if "image_sizes" in batch:
            options["image_sizes"] = batch["image_sizes"]
            if self.config.model_type == "llava_onevision":
                options["batch_num_images"] = torch.tensor([count for count in layout.counts if count] or [1])
        self._crops, self._pictures = layout.crops, layout.pictures
        # a picture that stands in belongs to nobody and does not vote
        is_blank = not any(layout.counts)
        weights = torch.zeros(sum(layout.crops), dtype=torch.int64, device=self.device) if is_blank else None
        self.routing["image"].weights = self.routing["projector"].weights = weights
        return self.model.model.get_image_features(pixel_values=pixels, **options).pooler_output

    def _look(self, forward: Callable, pixel_values: torch.Tensor, **options) -> BaseModelOutputWithPooling:
        """Stands in for the image tower's forward: gives the hidden states that are read, kept or computed."""
        layers = self._read_layers

        def compute(crops: torch.Tensor) -> torch.Tensor:
            states = forward(pixel_values[crops], **options).hidden_states
            return torch.stack([states[layer] for layer in layers], dim=1)  # (crops, layers, tokens, d)

        if self._tower_learns:
            states = compute(torch.arange(len(pixel_values), device=self.device))
        else:
            with torch.no_grad():
                states = self._cache.fetch(self._pictures, self._crops, compute, self.device)
        last = states[:, -1]
        drops_cls = self.config.vision_feature_select_strategy == "default"
        self.routing["projector"].guide = (last[:, 0] if drops_cls else last.mean(1)).detach()
        return BaseModelOutputWithPooling(hidden_states=dict(zip(layers, states.unbind(1), strict=True)))

    @cached_property
    def _tower_learns(self) -> bool:
        return any(isinstance(module, LowRankLinear) for module in self.model.model.vision_tower.modules())

    @cached_property
    def _ahead(self) -> list[AdaptedLinear]:
        """The adapters of the language model that read the guide `cls_image`, in the order of the layers."""
        modules = self.model.model.language_model.modules()
        return [module for module in modules if isinstance(module, AdaptedLinear) and module.guide == "cls_image"]

    @torch.no_grad()
    def _prepare_routing(self, batch: Batch, embeddings: torch.Tensor) -> None:
        """Sets what the language model's routers read; embeddings (n, t, d): of the tokens, before any picture."""
        routing, counts = self.routing["language"], batch["image_counts"]
        lengths = batch["prompt_length"][:, None]
        routing.padding = torch.arange(embeddings.shape[1], device=self.device) < lengths  # the prompt
        routing.end = batch["prompt_length"] - 1
        mask = batch["attention_mask"]
        routing.real = mask.bool() if mask.ndim == 2 else None
        prompt = (embeddings * routing.padding[..., None]).sum(1) / lengths
        cls = prompt.new_zeros(len(counts), self.tower_width)
        seen = self.routing["projector"].guide[batch["whole"]].to(cls.dtype)
        cls.index_add_(0, batch["picture_owner"], seen)
        cls /= counts.clamp(min=1)[:, None]
        routing.guide = torch.cat([cls, prompt * (counts == 0)[:, None]], dim=1).to(embeddings.dtype)
        routing.has_voted = False
        if self._ahead and self.training:
            vote_ahead(self._ahead)


def _slot(tower: str, number: int, layer: str, block: nn.Module, path: str) -> Slot:
    parent, _, attribute = path.rpartition(".")
    try:
        owner = block.get_submodule(parent)
        linear = getattr(owner, attribute)
    except AttributeError as error:
        raise InputError(
            f"targets.layers: a block of type {type(block).__name__} in the tower {tower} has no {path}; leave out "
            f"the layer {layer}"
        ) from error
    linear = linear.linear if isinstance(linear, LowRankLinear) else linear
    return Slot(f"{tower}.{number}.{layer}", tower, layer, linear, None, owner, attribute)


def load(config: BackboneConfig, placement: Placement | None, compiles: bool) -> LlavaBackbone:
    """Loads the model that a configuration names, as `load_llava`."""
    return load_llava(
        config.name,
        gradient_checkpointing=config.gradient_checkpointing,
        feature_cache_gb=config.feature_cache_gb,
        placement=placement,
        compiles=compiles,
    )


def weights_files(config: BackboneConfig) -> list[Path]:
    """Returns the files of a model's weights; none for random ones."""
    return files_of_weights(config.name)


def load_llava(
    name: str,
    *,
    gradient_checkpointing: bool = False,
    feature_cache_gb: float = 0.0,
    placement: Placement | None = None,
    compiles: bool = False,
) -> LlavaBackbone:
    """Loads `tiny`, a folder or a hub's name of a LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision model, or a shape of SHAPES.

    A shape, like a folder that has no weights, gets random ones, with a warning. placement: where the weights go; on
    the CPU in fp32 by default. compiles: the training forward of the language model's blocks, by torch.compile. Raises
    InputError for a model that cannot be had or used.
    """
    placement = placement or Placement()
    config = read_config(name)
    processor = read_processor(name)
    model = build_on_meta(config)
    if not map_weights(name, model):
        logging.getLogger(__name__).warning("backbone %s has random weights: it brings none", name)
    folder = model_folder(name)
    if folder is not None and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    place(model, placement)
    backbone = LlavaBackbone(model, processor, int(feature_cache_gb * 1e9), placement.zero3 is not None)
    if compiles:
        backbone.compile_blocks()
    if gradient_checkpointing:
        backbone.checkpoint_blocks()
    return backbone
