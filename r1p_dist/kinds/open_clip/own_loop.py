"""CLIPs and image towers in one's own loop: open_clip's models, CLIPModel and SiglipModel of transformers, timm's."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import open_clip
import torch
from torch import nn
from transformers import CLIPModel, SiglipModel

from r1p_dist.adapters import Routing
from r1p_dist.backbones.host import Host
from r1p_dist.backbones.slots import Slot
from r1p_dist.kinds.open_clip import LAYERS
from r1p_dist.kinds.open_clip.backbone import ClipBackbone
from r1p_dist.kinds.open_clip.towers import HfClipText, HfImageTower, ImageTower, Tower, open_towers


def host_of(model: nn.Module) -> Host | None:
    """Returns the host of a model, None for one that is none of these."""
    if isinstance(model, ClipBackbone):
        return BackboneHost(model)
    if isinstance(model, open_clip.CLIP | open_clip.CustomTextCLIP | open_clip.CoCa):
        return TowersHost(model, open_towers(model))
    if isinstance(model, CLIPModel | SiglipModel):
        image, text = HfImageTower(model.vision_model), HfClipText(model.text_model, isinstance(model, CLIPModel))
        return TowersHost(model, {"image": image, "text": text})
    if type(model).__module__.startswith("timm."):
        return TowersHost(model, {"image": ImageTower(model)})
    return None


class TowersHost(Host):
    """A model of one or both towers; they are told of a batch when their tokens come in, however they are called."""

    layers = LAYERS

    def __init__(self, model: nn.Module, towers: Mapping[str, Tower], routing: dict[str, Routing] | None = None):
        super().__init__(model, routing or {name: Routing(auto=tower.guide) for name, tower in towers.items()})
        self._towers = towers
        self.towers = self.default_towers = self.even_towers = tuple(towers)
        self._hook = None
        if routing is None and "text" in towers:
            self._hook = towers["text"].entry.register_forward_pre_hook(self._hear, with_kwargs=True)

    def slots(self, towers: Sequence[str], layers: Sequence[str]) -> Iterator[Slot]:
        for tower in towers:
            yield from self._towers[tower].slots(layers)

    def train(self, mode: bool) -> None:
        for tower in self._towers.values():
            tower.train(mode)

    def close(self) -> nn.Module:
        super().close()
        for tower in self._towers.values():
            tower.close()
        if self._hook is not None:
            self._hook.remove()
        return self.model

    def _hear(self, module: nn.Module, inputs: tuple, options: dict[str, Any]) -> None:
        if not self.model.training:
            return
        tokens: torch.Tensor = next(iter([*inputs, *options.values()]))
        tower, routing = self._towers["text"], self.routing["text"]
        routing.end = tower.end(tokens)
        routing.real = routing.padding = tower.real(tokens, routing.end)


class BackboneHost(TowersHost):
    """A `ClipBackbone`, which tells its towers itself; what is left without adapters is open_clip's model in it."""

    def __init__(self, model: ClipBackbone):
        super().__init__(model, model.towers, model.routing)

    def train(self, mode: bool) -> None:
        """Nothing is to be done: the backbone puts its towers into their modes itself."""

    def close(self) -> nn.Module:
        super().close()
        return self.model.model
