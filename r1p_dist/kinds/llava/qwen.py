"""Qwen's vision-language models: pictures of any size as rows of patches, positions in three dimensions.

The tower sees the patches of all pictures in one row, and the projector, its "merger", is a part of it; it makes one
token of each square of patches. Here a picture has as many crops as it gets tokens, and the merger comes behind what is
kept.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from r1p_dist.adapters import FusedProjection
from r1p_dist.backbones.conversations import Pictures
from r1p_dist.kinds.llava.family import GATED_MLP, Batch, Family, spread, stand_back, stand_in

_FUSED = {"q": "attn.qkv", "k": "attn.qkv", "v": "attn.qkv", "o": "attn.proj"}
_PARTS = ("q", "k", "v")  # the rows of a fused projection, in their order


class Qwen2Vl(Family):
    model_class = Qwen2VLForConditionalGeneration
    processors = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor")
    tower = "visual"
    projector = "visual.merger"
    blocks = "blocks"
    layers = {
        "language": Family.layers["language"],
        "projector": {"fc1": "mlp.0", "fc2": "mlp.2"},
        "image": {**_FUSED, "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
    }
    renamed = (
        (r"^visual\.", "model.visual."),
        (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
    )

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._square: int = self.config.vision_config.spatial_merge_size**2
        self._is_passing = False
        for projector in self.projectors:
            stand_in(projector, "forward", self._merge)

    @property
    def tower_width(self) -> int:
        return self.config.vision_config.embed_dim

    def linears(self, tower: str, layer: str, block: nn.Module) -> tuple[nn.Module, str, nn.Linear, slice | None]:
        if tower != "image" or layer not in _PARTS:
            return super().linears(tower, layer, block)
        if not isinstance(block.attn.qkv, FusedProjection):
            block.attn.qkv = FusedProjection(block.attn.qkv)
        fused, part = block.attn.qkv, _PARTS.index(layer)
        width = fused.linear.out_features // len(_PARTS)
        return fused.parts, layer, fused.linear, slice(part * width, (part + 1) * width)

    def close(self) -> None:
        for projector in self.projectors:
            stand_back(projector, "forward")
        for block in self.tower_blocks:
            if isinstance(block.attn.qkv, FusedProjection):
                block.attn.qkv = block.attn.qkv.linear

    def pictures(self, processor: ProcessorMixin) -> Pictures:
        return Pictures(beside=("image_grid_thw",), is_joined=True)

    def misfit(self, blank: Batch) -> str | None:
        tower, made = self.config.vision_config, blank["pixel_values"].shape[-1]
        taken = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
        return None if made == taken else f"makes patches of {made} numbers, its image tower takes {taken}"

    def crops(self, batch: Batch, counts: Sequence[int]) -> list[int]:
        return (batch["image_grid_thw"].prod(1) // self._square).tolist()

    def prepare(self, batch: Batch) -> Batch:
        types = _token_types(batch, self.config.image_token_id)
        grid, mask = batch["image_grid_thw"], batch["attention_mask"]
        positions, _ = self.parts.get_rope_index(batch["input_ids"], types, image_grid_thw=grid, attention_mask=mask)
        return {"position_ids": positions}

    def arguments(self, batch: Batch, counts: Sequence[int]) -> dict[str, Any]:
        names = ("pixel_values", "image_grid_thw", "position_ids")
        given = {name: batch[name] for name in names if name in batch}
        return given | {"mm_token_type_ids": _token_types(batch, self.config.image_token_id)}

    def pick(
        self, pixel_values: torch.Tensor, options: dict[str, Any], crops: Sequence[int], numbers: Sequence[int] | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        if numbers is None:
            return pixel_values, options
        patches = [count * self._square for count in crops]
        grid = options["grid_thw"][torch.tensor(numbers, device=pixel_values.device)]
        return pixel_values[spread(patches, numbers, pixel_values.device)], options | {"grid_thw": grid}

    def run(self, forward: Callable, *inputs: Any, **options: Any) -> BaseModelOutputWithPooling:
        self._is_passing = True
        try:
            return forward(*inputs, **options)
        finally:
            self._is_passing = False

    def _merge(self, forward: Callable, x: torch.Tensor) -> torch.Tensor:
        """Stands in for a merger's forward: while the tower runs, it gives the squares of patches as they are."""
        return x.reshape(-1, self._square * x.shape[-1]) if self._is_passing else forward(x)

    def keep(self, output: BaseModelOutputWithPooling) -> torch.Tensor:
        return output.pooler_output[:, None]  # (c, 1, square * d), in the order of the tokens

    def give(self, kept: torch.Tensor) -> BaseModelOutputWithPooling:
        (merged,) = self._merged(kept)
        return BaseModelOutputWithPooling(pooler_output=merged)

    def _merged(self, kept: torch.Tensor) -> list[torch.Tensor]:
        width = kept.shape[-1] // self._square
        return [merger(x.reshape(-1, width)) for merger, x in zip(self.projectors, kept.unbind(1), strict=True)]

    def guides(self, kept: torch.Tensor, crops: Sequence[int]) -> torch.Tensor:
        """Returns the mean of each picture's patches, (m, d)."""
        patches = kept[:, 0].unflatten(-1, (self._square, -1)).mean(1)
        return torch.stack([part.mean(0) for part in patches.split(list(crops))])

    def voters(self, crops: Sequence[int]) -> int:
        return len(crops)

    def whole(self, crops: Sequence[int]) -> torch.Tensor:
        return torch.arange(len(crops))

    def set_lengths(self, routing: Mapping[str, Any], crops: Sequence[int]) -> None:
        routing["projector"].lengths = list(crops)
        routing["image"].lengths = [count * self._square for count in crops]


class Qwen25Vl(Qwen2Vl):
    model_class = Qwen2_5_VLForConditionalGeneration
    layers = {**Qwen2Vl.layers, "image": {**_FUSED, **GATED_MLP}}

    @property
    def tower_width(self) -> int:
        return self.config.vision_config.hidden_size


class Qwen3Vl(Qwen25Vl):
    """Its decoder's first blocks get features of earlier blocks of the tower too, each by a merger of its own."""

    model_class = Qwen3VLForConditionalGeneration
    layers = {
        "language": Family.layers["language"],
        "projector": {"fc1": "linear_fc1", "fc2": "linear_fc2"},
        "image": {**_FUSED, "fc1": "mlp.linear_fc1", "fc2": "mlp.linear_fc2"},
    }

    def __init__(self, model: nn.Module):
        super().__init__(model)
        more = list(self.tower_module.deepstack_merger_list)
        for projector in more:
            stand_in(projector, "forward", self._merge)
        self.projectors = [*self.projectors, *more]

    def keep(self, output: BaseModelOutputWithPooling) -> torch.Tensor:
        return torch.stack([output.pooler_output, *output.deepstack_features], dim=1)

    def give(self, kept: torch.Tensor) -> BaseModelOutputWithPooling:
        merged, *more = self._merged(kept)
        return BaseModelOutputWithDeepstackFeatures(pooler_output=merged, deepstack_features=more)


def _token_types(batch: Batch, image_token: int) -> torch.Tensor:
    """Returns 1 at the tokens of pictures, (n, t)."""
    return (batch["input_ids"] == image_token).int()
