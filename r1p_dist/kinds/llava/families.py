"""The families of transformers' vision-language models that are served, by the `model_type` of their config.json."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma3ForConditionalGeneration,
    Idefics3ForConditionalGeneration,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    ProcessorMixin,
    SmolVLMForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from r1p_dist.backbones.conversations import Pictures
from r1p_dist.kinds.llava.family import ATTENTION, Batch, Family, ReadLayers, spread
from r1p_dist.kinds.llava.paligemma import PaliGemma
from r1p_dist.kinds.llava.qwen import Qwen2Vl, Qwen3Vl, Qwen25Vl


class Llava(ReadLayers):
    model_class = LlavaForConditionalGeneration
    processors = ("LlavaProcessor",)


class LlavaNext(ReadLayers):
    """Large pictures are cut into crops; a learnt vector ends each of their lines of tokens."""

    model_class = LlavaNextForConditionalGeneration
    processors = ("LlavaNextProcessor",)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        return [self.parts.image_newline]

    def pictures(self, processor: ProcessorMixin) -> Pictures:
        return Pictures(beside=("image_sizes",))

    def crops(self, batch: Batch, counts: Sequence[int]) -> list[int]:
        grid, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        cut = self._cut(counts)
        return [
            image_size_to_num_patches(size, grid, side) if is_cut else 1
            for size, is_cut in zip(batch["image_sizes"].tolist(), cut, strict=True)
        ]

    def _cut(self, counts: Sequence[int]) -> list[bool]:
        """Returns which pictures are cut."""
        return [True] * sum(counts)

    def arguments(self, batch: Batch, counts: Sequence[int]) -> dict[str, Any]:
        return {"pixel_values": batch["pixel_values"], "image_sizes": batch["image_sizes"]}


class LlavaOnevision(LlavaNext):
    """A picture is cut where its conversation has no other."""

    model_class = LlavaOnevisionForConditionalGeneration
    processors = ("LlavaOnevisionProcessor",)

    def _cut(self, counts: Sequence[int]) -> list[bool]:
        return [count == 1 for count in counts for _ in range(count)]

    def arguments(self, batch: Batch, counts: Sequence[int]) -> dict[str, Any]:
        return super().arguments(batch, counts) | {"batch_num_images": torch.tensor(counts)}


class Idefics3(Family):
    """Large pictures are cut into crops, and the whole one comes last; four by four tokens of the tower become one."""

    model_class = Idefics3ForConditionalGeneration
    processors = ("Idefics3Processor", "SmolVLMProcessor")
    decoder = "text_model"
    tower = "vision_model"
    projector = "connector"
    layers = {**Family.layers, "projector": {"fc1": "modality_projection.proj"}}
    renamed = ()
    shows_whole_last = True

    @property
    def side(self) -> None:
        """Any: positions are those of the share of a picture."""

    def pictures(self, processor: ProcessorMixin) -> Pictures:
        count = processor.image_processor.get_number_of_image_patches
        return Pictures(
            beside=("pixel_attention_mask",),
            is_joined=True,
            is_nested=True,
            count_crops=lambda height, width: max(1, count(height, width)[0]),
        )

    def crops(self, batch: Batch, counts: Sequence[int]) -> list[int]:
        return batch["crops"].tolist()

    def arguments(self, batch: Batch, counts: Sequence[int]) -> dict[str, Any]:
        # as if all were of one conversation: nothing is filled up
        return {name: batch[name][None] for name in ("pixel_values", "pixel_attention_mask")}

    def pick(
        self, pixel_values: torch.Tensor, options: dict[str, Any], crops: Sequence[int], numbers: Sequence[int] | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        if numbers is None:
            return pixel_values, options
        chosen = spread(crops, numbers, pixel_values.device)
        return pixel_values[chosen], options | {"patch_attention_mask": options["patch_attention_mask"][chosen]}


class SmolVlm(Idefics3):
    model_class = SmolVLMForConditionalGeneration


class InternVl(ReadLayers):
    """Large pictures are cut into crops, and the whole one comes last; two by two tokens of the tower become one."""

    model_class = InternVLForConditionalGeneration
    processors = ("InternVLProcessor",)
    blocks = "encoder.layer"
    layers = {
        **Family.layers,
        "image": {
            **{layer: path.replace("self_attn", "attention") for layer, path in ATTENTION.items()},
            "o": "attention.projection_layer",
            "fc1": "mlp.fc1",
            "fc2": "mlp.fc2",
        },
    }
    shows_whole_last = True

    def pictures(self, processor: ProcessorMixin) -> Pictures:
        count, options = processor.image_processor.get_number_of_image_patches, {"crop_to_patches": True}
        return Pictures(is_joined=True, count_crops=lambda height, width: count(height, width, options))

    def crops(self, batch: Batch, counts: Sequence[int]) -> list[int]:
        return batch["crops"].tolist()

    def keep(self, output: BaseModelOutputWithPooling) -> torch.Tensor:
        return output.last_hidden_state[:, None] if self._reads_the_end else super().keep(output)

    def give(self, kept: torch.Tensor) -> BaseModelOutputWithPooling:
        if self._reads_the_end:
            return BaseModelOutputWithPooling(last_hidden_state=kept[:, 0])
        return super().give(kept)

    @property
    def _reads_the_end(self) -> bool:
        return self.config.vision_feature_layer == -1


class Gemma3(Family):
    """Tokens of one picture see one another, later ones too; its projector has no linear."""

    model_class = Gemma3ForConditionalGeneration
    processors = ("Gemma3Processor",)
    layers = {**Family.layers, "projector": {}}
    is_causal = False

    @classmethod
    def unserved(cls, processor: ProcessorMixin) -> str | None:
        if processor.image_processor.do_pan_and_scan:
            return "cuts pictures (do_pan_and_scan), which is not served; set it to false in its preprocessor's file"
        return None

    def pictures(self, processor: ProcessorMixin) -> Pictures:
        return Pictures(is_joined=True)

    def arguments(self, batch: Batch, counts: Sequence[int]) -> dict[str, Any]:
        is_picture = batch["input_ids"] == self.config.image_token_id
        return {"pixel_values": batch["pixel_values"], "token_type_ids": is_picture.long()}


FAMILIES: dict[str, type[Family]] = {
    "llava": Llava,
    "llava_next": LlavaNext,
    "llava_onevision": LlavaOnevision,
    "qwen2_vl": Qwen2Vl,
    "qwen2_5_vl": Qwen25Vl,
    "qwen3_vl": Qwen3Vl,
    "idefics3": Idefics3,
    "smolvlm": SmolVlm,
    "internvl": InternVl,
    "gemma3": Gemma3,
    "paligemma": PaliGemma,
}
