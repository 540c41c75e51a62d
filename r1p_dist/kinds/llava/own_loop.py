"""Vision-language models of transformers in one's own loop, which calls them with what their processor gives.

Legend: n conversations of t tokens in a batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from r1p_dist.backbones.conversations import IGNORED
from r1p_dist.backbones.host import Host
from r1p_dist.backbones.slots import Slot
from r1p_dist.distributed import world_size
from r1p_dist.errors import InputError
from r1p_dist.kinds.llava import KIND
from r1p_dist.kinds.llava.backbone import LlavaBackbone
from r1p_dist.kinds.llava.families import FAMILIES, Idefics3, InternVl
from r1p_dist.kinds.llava.family import Batch, Family


def host_of(model: nn.Module) -> Host | None:
    """Returns the host of a model, None for one of another family."""
    if isinstance(model, LlavaBackbone):
        return LlavaHost(model, model)
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", None))
    if family is None or not isinstance(model, family.model_class):
        return None
    return LlavaHost(model, None)


class LlavaHost(Host):
    """A vision-language model, or a `LlavaBackbone`, which tells its routers itself."""

    towers = KIND.towers
    default_towers = KIND.default_towers
    even_towers = KIND.even_towers
    layers = KIND.layers

    def __init__(self, model: nn.Module, backbone: LlavaBackbone | None):
        super().__init__(model)
        self._hook = None
        if backbone is None:
            backbone = LlavaBackbone(model, processor=None)
            self._hook = model.register_forward_pre_hook(self._hear, with_kwargs=True)
        self._backbone, self.routing = backbone, backbone.routing

    def slots(self, towers: Sequence[str], layers: Sequence[str]) -> Iterator[Slot]:
        return self._backbone.slots(towers, layers)

    def train(self, mode: bool) -> None:
        self._backbone.training = mode
        if self._hook is not None:
            self._backbone.expect_nothing()

    def close(self) -> nn.Module:
        super().close()
        if self._hook is not None:
            self._hook.remove()
        return self._backbone.close()

    def undo(self) -> None:
        if self._hook is None:
            super().close()  # what stands in was there before
        else:
            self.close()

    def _hear(self, model: nn.Module, inputs: tuple, given: dict[str, Any]) -> None:
        if not self.model.training:
            return
        ids = given.get("input_ids")
        if ids is None:
            raise InputError(f"{type(model).__name__}: call it with input_ids=…, by which pictures find their routers")
        pixels, mask, labels = given.get("pixel_values"), given.get("attention_mask"), given.get("labels")
        if pixels is None and world_size() > 1 and any(slot.tower != "language" for slot in self._slots):
            raise InputError(
                "a batch without pictures while other ranks have some: experts outside the language model would wait "
                "for each other; give every rank a picture, or use towers=['language']"
            )
        lengths = ids.new_full((len(ids),), ids.shape[1])
        if labels is not None:
            is_answer = labels != IGNORED
            lengths = torch.where(is_answer.any(1), is_answer.int().argmax(1), lengths)
            lengths = torch.where(lengths == 0, ids.shape[1], lengths)  # the labels of a text without a question
        batch: Batch = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        batch |= {"attention_mask": torch.ones_like(ids) if mask is None else mask, "prompt_length": lengths}
        batch["image_counts"] = ids.new_zeros(len(ids))
        if pixels is not None:
            batch |= picture_counts(self._backbone.family, batch)
        self._backbone.expect(batch)


class Run(NamedTuple):
    """Image tokens of a conversation in one piece."""

    row: int
    length: int
    before: int  # the token before them, -1 where they come first


def picture_counts(family: Family, batch: Batch) -> Batch:
    """Returns how many pictures each conversation has, "image_counts" (n,), and "crops" of each where pictures are cut.

    Found by the image tokens in input_ids, for the processor does not say it. InputError: they do not fit the pixels.
    """
    runs = _runs(batch["input_ids"], family.config.image_token_id)
    tokens, rows = sum(run.length for run in runs), len(batch["input_ids"])
    crops: list[int] | None = None
    if isinstance(family, Idefics3):
        # a run is a crop; the last one of a picture shows it whole, behind a token that says so
        ends = [number for number, run in enumerate(runs) if run.before == runs[-1].before]
        crops = [end - start for start, end in zip([-1, *ends], ends, strict=False)]
        owners = [runs[end].row for end in ends]
    elif isinstance(family, InternVl):
        each = tokens // len(batch["pixel_values"])
        crops, owners = [run.length // each for run in runs], [run.row for run in runs]
    else:
        count = len(batch["image_grid_thw"]) if "image_grid_thw" in batch else len(batch["pixel_values"])
        if len(runs) == count:
            owners = [run.row for run in runs]
        else:  # pictures of one size, with nothing between them
            each = max(1, tokens // count)
            if tokens % count or any(run.length % each for run in runs):
                raise InputError(
                    f"input_ids have {tokens} image tokens in {len(runs)} pieces: these are not the {count} pictures "
                    "of pixel_values"
                )
            owners = [run.row for run in runs for _ in range(run.length // each)]
    found = {"image_counts": torch.bincount(torch.tensor(owners, dtype=torch.int64), minlength=rows)}
    if crops is not None:
        found["crops"] = torch.tensor(crops)
    device = batch["input_ids"].device
    return {name: value.to(device) for name, value in found.items()}


def _runs(ids: torch.Tensor, image_token: int) -> list[Run]:
    found = []
    for row, tokens in enumerate(ids.tolist()):
        length = 0
        for place, token in enumerate([*tokens, None]):
            if token == image_token:
                length += 1
            elif length:
                start = place - length
                found.append(Run(row, length, tokens[start - 1] if start else -1))
                length = 0
    return found
