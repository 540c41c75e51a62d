"""CLIPs and image towers in one's own loop: open_clip's models, CLIPModel and SiglipModel of transformers, timm's."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import open_clip
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
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
        return TowersHost(model, open_towers)
    if isinstance(model, CLIPModel | SiglipModel):
        return TowersHost(model, _hf_towers)
    if type(model).__module__.startswith("timm."):
        return TowersHost(model, lambda model: {"image": ImageTower(model)})
    return None


def _hf_towers(model: CLIPModel | SiglipModel) -> dict[str, Tower]:
    text = HfClipText(model.text_model, is_causal=isinstance(model, CLIPModel))
    return {"image": HfImageTower(model.vision_model), "text": text}


class TowersHost(Host):
    """A model of one or both towers; they are told of a batch when their tokens come in, however they are called."""

    layers = LAYERS

    def __init__(self, model: nn.Module, open_towers: Callable[[Any], Mapping[str, Tower]]):
        super().__init__(model)
        self._towers = open_towers(model)
        self.routing = {name: Routing(auto=tower.guide) for name, tower in self._towers.items()}
        self.towers = self.default_towers = self.even_towers = tuple(self._towers)
        self._hook = self._listen() if "text" in self._towers else None

    def _listen(self) -> RemovableHandle | None:
        """Makes the text tower's routers hear of every batch; returns what ends that."""
        return self._towers["text"].entry.register_forward_pre_hook(self._hear, with_kwargs=True)

    def slots(self, towers: Sequence[str], layers: Sequence[str]) -> Iterator[Slot]:
        for tower in towers:
            yield from self._towers[tower].slots(layers)

    def train(self, mode: bool) -> None:
        for tower in self._towers.values():
            tower.train(mode)
        self.model.training = mode  # a timm model is a tower itself

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
        super().__init__(model, lambda model: model.towers)
        self.routing = model.routing

    def _listen(self) -> None:
        """Nothing is to be heard."""

    def train(self, mode: bool) -> None:
        """Nothing is to be done: the backbone puts its towers into their modes itself."""

    def close(self) -> nn.Module:
        super().close()
        return self.model.model

    def undo(self) -> None:
        Host.close(self)  # its towers stay open
