"""The common shape of transformers' vision-language models: an image tower, a projector, a decoder.

A family is a subclass that says what it has otherwise: where its linears are, what of its tower is kept, what its model
wants to know beside tokens and pixels.

Legend: n conversations of t tokens in a batch, m pictures in it, c crops of all pictures, d the tower's width.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, update_wrapper
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from r1p_dist.backbones.conversations import Pictures
from r1p_dist.errors import InputError

Batch = dict[str, torch.Tensor]
ATTENTION = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
GATED_MLP = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


class Family:
    """One family's parts of a model, and how its pictures come in. What a subclass does not say is as written here.

    model_class, processors: transformers', the latter by name. decoder, tower, projector: where they are in
    `model.model`; blocks: of the tower, in it. layers: of each tower, the linears of a block, by layer. renamed: names
    of weights in the published files, and in transformers' module. shows_whole_last: of a picture's crops the last one
    shows all of it, not the first. is_causal: no token of the decoder sees a later one.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    processors: ClassVar[tuple[str, ...]]
    decoder: ClassVar[str] = "language_model"
    tower: ClassVar[str] = "vision_tower"
    projector: ClassVar[str] = "multi_modal_projector"
    blocks: ClassVar[str] = "encoder.layers"
    layers: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "language": {**ATTENTION, "o": "self_attn.o_proj", **GATED_MLP},
        "projector": {"fc1": "linear_1", "fc2": "linear_2"},
        "image": {**ATTENTION, "o": "self_attn.out_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
    }
    renamed: ClassVar[Sequence[tuple[str, str]]] = (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
        (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
    )
    shows_whole_last: ClassVar[bool] = False
    is_causal: ClassVar[bool] = True

    def __init__(self, model: nn.Module):
        parts = model.model
        self.config: PreTrainedConfig = model.config
        self.parts = parts
        self.decoder_module: nn.Module = parts.get_submodule(self.decoder)
        self.tower_module: nn.Module = parts.get_submodule(self.tower)
        self.tower_blocks: Sequence[nn.Module] = self.tower_module.get_submodule(self.blocks)
        self.projectors: Sequence[nn.Module] = [parts.get_submodule(self.projector)]

    @classmethod
    def module_name(cls, name: str) -> str:
        """Returns how a weight of a model's files is called in transformers' module."""
        for pattern, replacement in cls.renamed:
            name = re.sub(pattern, replacement, name)
        return name

    @classmethod
    def unserved(cls, processor: ProcessorMixin) -> str | None:
        """Returns what a processor does that is not served here, None where there is nothing."""
        return None

    @classmethod
    def processor(cls, processor: ProcessorMixin) -> ProcessorMixin:
        """Returns a model's processor in a form that takes a whole conversation as one text."""
        return processor

    @property
    def tower_width(self) -> int:
        return self.config.vision_config.hidden_size

    @property
    def side(self) -> int | None:
        """The side, in pixels, of what the image tower takes; None: any."""
        size = getattr(self.config.vision_config, "image_size", None)
        return size[0] if isinstance(size, list | tuple) else size

    @property
    def seen_blocks(self) -> Sequence[nn.Module]:
        """The image tower's blocks up to the last one whose output the projector reads."""
        return self.tower_blocks

    def linears(self, tower: str, layer: str, block: nn.Module) -> tuple[nn.Module, str, nn.Linear, slice | None]:
        """Returns the owner of a block's linear, its name there, itself, and its rows that are the layer's.

        AttributeError: the block is built otherwise.
        """
        parent, _, attribute = self.layers[tower][layer].rpartition(".")
        owner = block.get_submodule(parent)
        return owner, attribute, getattr(owner, attribute), None

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that forward reads from modules that it does not call."""
        return []

    def close(self) -> None:
        """Puts transformers' own modules back where others stand in for them."""

    # Pictures, as they come from the processor and go to the model

    def pictures(self, processor: ProcessorMixin) -> Pictures:
        """Returns how the processor gives pictures."""
        return Pictures()

    def misfit(self, blank: Batch) -> str | None:
        """Returns what a processor makes of a picture that the image tower does not take, None where it fits."""
        side, made = self.side, blank["pixel_values"].shape[-1]
        if side is None or made == side:
            return None
        return f"makes pictures of {made} x {made} pixels, its image tower takes {side} x {side}"

    def crops(self, batch: Batch, counts: Sequence[int]) -> list[int]:
        """Returns the crops of each picture of a batch; counts: pictures of each conversation, [1] if there is none."""
        return [1] * len(batch["pixel_values"])

    def prepare(self, batch: Batch) -> Batch:
        """Returns what the host computes for `arguments` of a training batch, before it goes to the device."""
        return {}

    def arguments(self, batch: Batch, counts: Sequence[int]) -> dict[str, Any]:
        """Returns what the model takes beside tokens and their mask; counts: as in `crops`."""
        return {"pixel_values": batch["pixel_values"]}

    # What the tower says of pictures, which is kept for the next time

    def pick(
        self, pixel_values: torch.Tensor, options: dict[str, Any], crops: Sequence[int], numbers: Sequence[int] | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Returns the arguments of the tower's forward for some of the batch's pictures, or for all (None)."""
        if numbers is None:
            return pixel_values, options
        return pixel_values[spread(crops, numbers, pixel_values.device)], options

    def run(self, forward: Callable, *inputs: Any, **options: Any) -> BaseModelOutputWithPooling:
        """Calls the tower's forward."""
        return forward(*inputs, **options)

    def keep(self, output: BaseModelOutputWithPooling) -> torch.Tensor:
        """Returns what the projector will read, (c, …, tokens, d), of the tower's output."""
        return output.last_hidden_state

    def give(self, kept: torch.Tensor) -> BaseModelOutputWithPooling:
        """Returns the tower's output with what was kept of it."""
        return BaseModelOutputWithPooling(last_hidden_state=kept)

    def guides(self, kept: torch.Tensor, crops: Sequence[int]) -> torch.Tensor:
        """Returns one vector (d,) of each sample that votes in the projector, a crop; the rows are theirs."""
        return kept.mean(1)

    def voters(self, crops: Sequence[int]) -> int:
        """Returns how many samples vote in the projector and in the tower."""
        return sum(crops)

    def whole(self, crops: Sequence[int]) -> torch.Tensor:
        """Returns the row of `guides` that is about all of a picture, (m,)."""
        ends = torch.tensor(crops).cumsum(0)
        return ends - 1 if self.shows_whole_last else ends - torch.tensor(crops)

    def set_lengths(self, routing: Mapping[str, Any], crops: Sequence[int]) -> None:
        """Notes how long the samples are in towers whose linears see all of them in one row."""

    def finish(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns the logits that count, by what the head made."""
        return logits


class ReadLayers(Family):
    """Families whose projector reads some of the image tower's layers, with or without its [CLS]."""

    @property
    def _read(self) -> list[int]:
        """The hidden states of the image tower that the projector reads."""
        read = self.config.vision_feature_layer
        return [read] if isinstance(read, int) else list(read)

    @property
    def seen_blocks(self) -> Sequence[nn.Module]:
        # hidden state 0 is the input of block 0
        return self.tower_blocks[: max(layer % (len(self.tower_blocks) + 1) for layer in self._read)]

    def keep(self, output: BaseModelOutputWithPooling) -> torch.Tensor:
        return torch.stack([output.hidden_states[layer] for layer in self._read], dim=1)  # (c, layers, tokens, d)

    def give(self, kept: torch.Tensor) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(hidden_states=dict(zip(self._read, kept.unbind(1), strict=True)))

    def guides(self, kept: torch.Tensor, crops: Sequence[int]) -> torch.Tensor:
        last = kept[:, -1]
        return last[:, 0] if self.config.vision_feature_select_strategy == "default" else last.mean(1)


def spread(crops: Sequence[int], numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Returns the places of the crops of some pictures among those of all."""
    starts = [sum(crops[:number]) for number in range(len(crops))]
    return torch.tensor([starts[number] + crop for number in numbers for crop in range(crops[number])], device=device)


def slots_of(family: Family, tower: str, layers: Sequence[str]) -> Iterator[tuple[int, str, tuple]]:
    """Yields the number of a block, the layer, and its `linears`, block by block.

    InputError: a block that is built otherwise.
    """
    blocks = {"language": family.decoder_module.layers, "projector": family.projectors, "image": family.seen_blocks}
    for number, block in enumerate(blocks[tower]):
        for layer in family.layers[tower]:
            if layer in layers:
                try:
                    yield number, layer, family.linears(tower, layer, block)
                except AttributeError as error:
                    raise InputError(
                        f"targets.layers: a block of type {type(block).__name__} in the tower {tower} has no "
                        f"{family.layers[tower][layer]}; leave out the layer {layer}"
                    ) from error


def stand_in(module: nn.Module, name: str, function: Callable) -> None:
    """Makes `function(the module's own method of that name, …)` what is called by that name."""
    own = getattr(module, name)
    # generation asks for the signature
    setattr(module, name, update_wrapper(partial(function, own), own))


def stand_back(module: nn.Module, name: str) -> None:
    """Undoes `stand_in`."""
    own = getattr(module, name).args[0]
    if getattr(own, "__func__", None) is getattr(type(module), name):
        delattr(module, name)
    else:  # it was somebody else's stand-in
        setattr(module, name, own)
