"""Vision-language models of transformers: image tower, projector, decoder; the loss on answers, and generation.

transformers' own forward does all that; what is here stands in at three places in it. The image tower's output is kept
or computed, a batch without pictures sees a blank one of which nothing is left, and the routers learn their guide
before the decoder runs.

Legend: n conversations of t tokens in a batch, m pictures in it, c crops of all pictures (one each, but where the
family cuts large pictures), d widths of the parts.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
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
from r1p_dist.distributed import sum_over_ranks, world_size
from r1p_dist.errors import InputError, one_line
from r1p_dist.kinds.llava.families import FAMILIES
from r1p_dist.kinds.llava.family import Batch, slots_of, stand_back, stand_in
from r1p_dist.kinds.llava.feature_cache import FeatureCache
from r1p_dist.kinds.llava.feature_files import FeatureFiles, tower_fingerprint
from r1p_dist.kinds.llava.packing import pack, packed_options, unpackable, use_packing
from r1p_dist.kinds.llava.token_losses import give_losses
from r1p_dist.kinds.llava.weights import (
    build_on_meta,
    files_of_weights,
    map_weights,
    model_folder,
    read_config,
    read_processor,
    set_attention,
)


class Layout(NamedTuple):
    """The pictures of a batch of conversations, as the host must know them."""

    counts: list[int]  # pictures of each conversation
    per_sample: list[int]  # the same of those that have some; [1] for a batch without any
    crops: list[int]  # of each picture; a batch without any has a blank one
    pictures: list[str] | None  # a name of what each shows, by its digest, where there are digests


class LlavaBackbone(nn.Module):
    """A vision-language model of one of FAMILIES, frozen, with its processor.

    forward(batch) returns the cross entropy (k,) of the batch's k answer tokens and the conversation (k,) of each;
    forward(batch, max_new_tokens) generates, greedily: (n, up to max_new_tokens) token ids. A batch is what
    `ConversationEncoder.collate` returns, or `prepare` makes of it.

    The guide `cls_image` of a conversation is the vector [CLS; p]: the mean over its pictures of the image tower's
    [CLS] (in the layer that the projector reads; of the whole picture where there are crops; the mean of all tokens
    where the projector sees all of them, which towers without [CLS] need), and zeros; for a conversation without
    pictures zeros, and the mean of the input embeddings of its prompt. The projector's pictures, or crops, vote one by
    one, by the same vector of their own.
    """

    kind = "llava"

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin | None,
        cache_bytes: int = 0,
        is_sharded: bool = False,
        files: FeatureFiles | None = None,
    ):
        """processor: None where only the model itself is called, which `expect` prepares. cache_bytes, files: of
        features of a tower that does not learn; 0, None: none. is_sharded: by ZeRO-3."""
        super().__init__()
        self.model = model.requires_grad_(False)
        self.is_sharded = is_sharded
        self.family = family = FAMILIES[model.config.model_type](model)
        self.processor = None if processor is None else family.processor(processor)
        self.tower_width, self.width = family.tower_width, model.config.text_config.hidden_size
        self.routing = {
            "language": Routing(guide_width=self.tower_width + self.width),
            "projector": Routing(guide_width=self.tower_width),
            "image": Routing(),
        }
        self._cache = FeatureCache(cache_bytes, is_sharded, files)
        self._layout: Layout | None = None  # of the batch that the model looks at
        self._batch: Batch | None = None  # of the training forward under way
        self._nothing: torch.Tensor | None = None  # what is left of a blank picture, a zero with its gradient
        # transformers would put its hooks in later, and an engine takes away all hooks that came in its time
        maybe_install_capturing_hooks(family.tower_module)
        stand_in(family.tower_module, "forward", self._look)
        stand_in(family.parts, "get_image_features", self._see)
        stand_in(family.decoder_module, "forward", self._read)
        give_losses(model.lm_head, family.finish)

    @property
    def device(self) -> torch.device:
        return self.model.device  # by a list of parameters: to ask one by its name would gather it under ZeRO-3

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    def slots(self, towers: Sequence[str], layers: Sequence[str]) -> Iterator[Slot]:
        """Yields the linears that can have adapters, tower by tower, block by block.

        InputError: a block that is built otherwise.
        """
        for tower in towers:
            for number, layer, (owner, attribute, linear, rows) in slots_of(self.family, tower, layers):
                linear = linear.linear if isinstance(linear, LowRankLinear) else linear
                yield Slot(f"{tower}.{number}.{layer}", tower, layer, linear, rows, owner, attribute)

    def attach(
        self, make: Callable[[Slot, Routing], LowRankLinear], towers: Sequence[str], layers: Sequence[str]
    ) -> list[LowRankLinear]:
        """Puts `make(slot, routing)` on its linears; returns the adapters in the order of `slots`."""
        return fill(list(self.slots(towers, layers)), self.routing, make)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that forward reads from modules that it does not call."""
        return self.family.borrowed_parameters()

    def compile_blocks(self) -> None:
        """Compiles the training forward of the language model's blocks; before `checkpoint_blocks`."""
        compile_blocks(self.family.decoder_module.layers)

    def checkpoint_blocks(self) -> None:
        """Makes every block run its forward again in the backward instead of keeping its activations."""
        for block in [*self.family.tower_blocks, *self.family.decoder_module.layers]:
            checkpoint_forward(block)

    def check(self, stream: Stream) -> None:
        """Raises InputError for a stream that has no conversations, before any training."""
        if not stream.tasks[0].is_instruction:
            raise InputError(
                f"stream={stream.path}: has classes, backbone.kind=llava learns conversations (tasks with a `metric`); "
                "use backbone.kind=open_clip or another stream"
            )

    def encoder(self, data: DataConfig) -> ConversationEncoder:
        """Returns what makes batches of samples; pictures are taken as they are, without augmentation.

        InputError: data.packing for a decoder that cannot, or pictures that the image tower does not take.
        """
        if data.packing:
            decoder = self.family.decoder_module
            reason = unpackable(decoder)
            if reason is not None:
                raise InputError(
                    f"data.packing=true: the decoder of this {self.config.model_type} {reason}; set it to false"
                )
            use_packing(decoder)
        encoder = ConversationEncoder(
            self.processor,
            self.config.image_token_id,
            self.config.text_config.max_position_embeddings,
            is_blind=data.blind,
            form=self.family.pictures(self.processor),
            has_digests=self._cache.keeps,
            packs=data.packing,
        )
        misfit = self.family.misfit(encoder.blank())
        if misfit is not None:
            raise InputError(f"backbone: its processor {misfit}; use the processor that belongs to the model")
        return encoder

    def tower_parameters(self, towers: Sequence[str]) -> dict[str, nn.Parameter]:
        """Returns the weights of towers by their names in `named_parameters`; the language model's with its head."""
        family = self.family
        projectors = {parameter for projector in family.projectors for parameter in projector.parameters()}
        parts = {
            "language": {*family.decoder_module.parameters(), *self.model.lm_head.parameters()},
            "projector": projectors,
            "image": set(family.tower_module.parameters()) - projectors,
        }
        wanted = set().union(*(parts[tower] for tower in towers))
        return {name: parameter for name, parameter in self.named_parameters() if parameter in wanted}

    def preparer(self, prompts: Sequence[str]) -> Callable[[Batch], Batch]:
        """Returns `prepare`: a conversation brings its prompt along."""
        return self.prepare

    def prepare(self, batch: Batch) -> Batch:
        """Returns a micro batch of n conversations with what the host knows of its k answer tokens and m pictures.

        "answers" (k,): the places, in the flattened batch, of the tokens before them; "owner" (k,): the conversation of
        each; "answer_counts" (n,); "layout": a `Layout`; "whole" (m,): the row of guides that is about all of a
        picture, and "picture_owner" (m,): the conversation of each picture; and what the family computes here. A batch
        that is to be packed has one row, as `pack` makes it.
        """
        is_answer, layout = F.pad(batch["labels"][:, 1:] != IGNORED, (0, 1)), self._lay_out(batch)
        known = {
            "owner": is_answer.nonzero()[:, 0],
            "answer_counts": is_answer.sum(1),
            "layout": layout,
            **self._owners(layout),
        }
        batch = batch | self.family.prepare(batch) | known
        if batch.get("is_packed", False):
            is_answer = is_answer[batch["attention_mask"].bool()]
            batch = pack(batch)
        return batch | {"answers": is_answer.flatten().nonzero().flatten()}

    def _owners(self, layout: Layout) -> dict[str, torch.Tensor]:
        """Returns which guide is about all of a picture, and whose conversation's each picture is."""
        counts = torch.tensor(layout.counts)
        return {
            "whole": self.family.whole(layout.crops)[: sum(layout.counts)],
            "picture_owner": torch.arange(len(counts)).repeat_interleave(counts),
        }

    def expect(self, batch: Batch) -> None:
        """Is told the training batch that the model is about to see, in a loop that calls the model itself.

        batch: on the device: input_ids and attention_mask (n, t), prompt_length and image_counts (n,), and what the
        family's crops are found by; no pixel_values where there is no picture, so the tower does not run.
        """
        if "pixel_values" in batch:
            layout = self._lay_out(batch)
        else:
            layout = Layout([0] * len(batch["image_counts"]), [1], [1], None)
            self.routing["projector"].guide = torch.zeros(1, self.tower_width, device=self.device)
        self._layout = layout
        self._batch = batch | {name: places.to(self.device) for name, places in self._owners(layout).items()}

    def expect_nothing(self) -> None:
        """Is told that what the model sees next is not trained on: nothing stands in."""
        self._layout = self._batch = None

    def close(self) -> nn.Module:
        """Returns transformers' model with nothing standing in any more; it must have no adapters."""
        family = self.family
        for module, name in (
            (family.tower_module, "forward"),
            (family.parts, "get_image_features"),
            (family.decoder_module, "forward"),
            (self.model.lm_head, "forward"),
        ):
            stand_back(module, name)
        family.close()
        return self.model

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

    def sample_losses(self, model: Callable, batch: Batch) -> torch.Tensor:
        """Returns each conversation's part (n,) of what `loss` is the mean of."""
        losses, conversations = model(batch)
        weights = batch["weight"]
        parts = losses.new_zeros(len(weights)).index_add(0, conversations, losses * weights[conversations])
        return len(weights) * parts

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
        if max_new_tokens is None and "layout" not in batch:
            batch = self.prepare(batch)
        self._layout = layout = batch.get("layout") or self._lay_out(batch)
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        given |= self.family.arguments(batch, layout.per_sample)
        if "places" in batch:
            given["position_ids"] = batch["position_ids"]
        given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
        self._batch = batch if max_new_tokens is None else None
        if max_new_tokens is not None:
            self.routing["language"].real = batch["attention_mask"].bool()
            with _naming_processor():
                ids = self.model.generate(
                    **given,
                    generation_config=self._generation(max_new_tokens),
                    synced_gpus=self.is_sharded and world_size() > 1,
                )
            return ids[:, batch["input_ids"].shape[1] :]
        with _naming_processor():
            hidden = self.model.model(**given, use_cache=False)[0]
        answers = batch["answers"]
        hidden = hidden.flatten(0, 1)[answers]  # of the tokens that count alone
        if gives_logits:
            return self.family.finish(self.model.lm_head(hidden))
        return self.model.lm_head(hidden, batch["labels"].flatten()[answers + 1]), batch["owner"]

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

    def _lay_out(self, batch: Batch) -> Layout:
        """Returns how many pictures and crops a batch has, and whose they are; the host waits for a device."""
        counts = batch["image_counts"].tolist()
        per_sample = [count for count in counts if count] or [1]
        crops = self.family.crops(batch, per_sample)
        pictures = None
        if "picture_digests" in batch:
            # crops: one that is alone in its conversation may be cut, and show more
            digests = batch["picture_digests"].cpu().numpy()
            pictures = [f"{digest.tobytes().hex()}-{count}" for digest, count in zip(digests, crops, strict=True)]
        return Layout(counts, per_sample, crops, pictures)

    def _see(self, get: Callable, *args, **options) -> BaseModelOutputWithPooling:
        """Stands in for the model's `get_image_features`: of a blank picture nothing is left but a zero."""
        if self._layout is None:
            return get(*args, **options)
        layout, is_blank = self._layout, not any(self._layout.counts)
        # a picture that stands in belongs to nobody and does not vote
        voters = self.family.voters(layout.crops)
        weights = torch.zeros(voters, dtype=torch.int64, device=self.device) if is_blank else None
        self.routing["image"].weights = self.routing["projector"].weights = weights
        self.family.set_lengths(self.routing, layout.crops)
        output = get(*args, **options)
        if is_blank:
            seen = [output.pooler_output, *getattr(output, "deepstack_features", ())]
            self._nothing = 0 * sum(_sum(part) for part in seen)
            output.pooler_output, *more = [_none_of(part) for part in seen]
            if more:
                output.deepstack_features = more
        return output

    def _look(self, forward: Callable, pixel_values: torch.Tensor, **options) -> BaseModelOutputWithPooling:
        """Stands in for the image tower's forward: gives of it what is read, kept or computed."""
        family, layout = self.family, self._layout
        if layout is None:
            return forward(pixel_values, **options)

        def compute(numbers: Sequence[int] | None) -> torch.Tensor:
            pixels, chosen = family.pick(pixel_values, options, layout.crops, numbers)
            return family.keep(family.run(forward, pixels, **chosen))

        if self._tower_learns:
            kept = compute(None)
        else:
            with torch.no_grad():
                kept = self._cache.fetch(layout.pictures, layout.crops, compute, self.device)
        self.routing["projector"].guide = family.guides(kept, layout.crops).detach()
        return family.give(kept)

    def _read(self, forward: Callable, *args, **options) -> BaseModelOutputWithPast:
        """Stands in for the decoder's forward: every rank's backward goes through the same layers; routers are told."""
        embeddings = options["inputs_embeds"]
        if self._nothing is not None:
            options["inputs_embeds"] = embeddings + self._nothing.to(embeddings.dtype)
            self._nothing = None
        if self._batch is not None:
            if "places" in self._batch:
                options |= packed_options(self.family.decoder_module, self._batch)
            self._prepare_routing(self._batch, embeddings)
            self._batch = None
        return forward(*args, **options)

    @cached_property
    def _tower_learns(self) -> bool:
        """Whether adapters or weights of its own change what the image tower says."""
        modules = [module for block in self.family.tower_blocks for module in block.modules()]
        weights = self.tower_parameters(["image"]).values()
        return any(isinstance(module, LowRankLinear) for module in modules) or any(w.requires_grad for w in weights)

    @cached_property
    def _ahead(self) -> list[AdaptedLinear]:
        """The adapters of the language model that read the guide `cls_image`, in the order of the layers."""
        modules = self.family.decoder_module.modules()
        return [module for module in modules if isinstance(module, AdaptedLinear) and module.guide == "cls_image"]

    @torch.no_grad()
    def _prepare_routing(self, batch: Batch, embeddings: torch.Tensor) -> None:
        """Sets what the language model's routers read; embeddings (n, t, d): of the tokens, pictures' too.

        Conversations in one row are read as if each had its own: they vote as they do without packing.
        """
        routing, counts = self.routing["language"], batch["image_counts"]
        routing.places = batch.get("places")
        if routing.places is not None:
            embeddings = embeddings.flatten(0, 1)[routing.places]
        mask = batch["attention_mask"]
        routing.real = mask.bool() if mask.ndim == 2 and routing.places is None else None
        prompt = torch.arange(embeddings.shape[1], device=self.device) < batch["prompt_length"][:, None]
        # one's own loop may pad in front
        routing.padding = prompt if routing.real is None else prompt & routing.real
        routing.end = batch["prompt_length"] - 1
        prompt = (embeddings * routing.padding[..., None]).sum(1) / routing.padding.sum(1, keepdim=True)
        cls = prompt.new_zeros(len(counts), self.tower_width)
        seen = self.routing["projector"].guide[batch["whole"]].to(cls.dtype)
        cls.index_add_(0, batch["picture_owner"], seen)
        cls /= counts.clamp(min=1)[:, None]
        routing.guide = torch.cat([cls, prompt * (counts == 0)[:, None]], dim=1).to(embeddings.dtype)
        routing.has_voted = False
        if self._ahead and self.training:
            vote_ahead(self._ahead)


def _sum(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    return features.sum() if isinstance(features, torch.Tensor) else sum(part.sum() for part in features)


def _none_of(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    return features[:0] if isinstance(features, torch.Tensor) else [part[:0] for part in features]


@contextmanager
def _naming_processor() -> Iterator[None]:
    """Says whose fault it is where a processor writes fewer or more tokens for a picture than the model makes of it."""
    try:
        yield
    except ValueError as error:
        if "tokens do not match" not in str(error):  # transformers' words
            raise
        raise InputError(
            f"backbone: its processor does not fit its image tower: {one_line(error)}; use the processor that belongs "
            "to the model"
        ) from error


def load(config: BackboneConfig, placement: Placement | None, compiles: bool) -> LlavaBackbone:
    """Loads the model that a configuration names, as `load_llava`."""
    return load_llava(
        config.name,
        gradient_checkpointing=config.gradient_checkpointing,
        attn_implementation=config.attn_implementation,
        feature_cache_gb=config.feature_cache_gb,
        feature_cache_dir=config.feature_cache_dir,
        feature_cache_dir_gb=config.feature_cache_dir_gb,
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
    attn_implementation: str | None = None,
    feature_cache_gb: float = 0.0,
    feature_cache_dir: Path | None = None,
    feature_cache_dir_gb: float | None = None,
    placement: Placement | None = None,
    compiles: bool = False,
) -> LlavaBackbone:
    """Loads `tiny`, a folder or a hub's name of a model of one of FAMILIES, or a shape of SHAPES.

    A shape, like a folder that has no weights, gets random ones, with a warning. placement: where the weights go; on
    the CPU in fp32 by default. attn_implementation: transformers'; its own choice by default. compiles: the training
    forward of the language model's blocks, by torch.compile. Raises InputError for a model that cannot be had or used.
    """
    placement = placement or Placement()
    config = read_config(name)
    processor = read_processor(name)
    model = build_on_meta(config)
    if attn_implementation is not None:
        set_attention(model, attn_implementation, placement.dtype)
    if not map_weights(name, model):
        logging.getLogger(__name__).warning("backbone %s has random weights: it brings none", name)
    folder = model_folder(name)
    if folder is not None and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    files = None
    if feature_cache_dir is not None:
        limit = None if feature_cache_dir_gb is None else int(feature_cache_dir_gb * 1e9)
        files = FeatureFiles(feature_cache_dir, _fingerprint(model, processor, placement), limit)
    place(model, placement)
    backbone = LlavaBackbone(model, processor, int(feature_cache_gb * 1e9), placement.zero3 is not None, files)
    if compiles:
        backbone.compile_blocks()
    if gradient_checkpointing:
        backbone.checkpoint_blocks()
    return backbone


def _fingerprint(model: nn.Module, processor: ProcessorMixin, placement: Placement) -> str:
    """Returns what decides the features of a model's image tower."""
    facts = model.config.to_dict()
    own = {key: facts.get(key) for key in ("model_type", "vision_feature_layer", "vision_config")}
    tower = model.model.get_submodule(FAMILIES[model.config.model_type].tower)
    return tower_fingerprint(tower, processor, own, placement)
