"""The pristine weights of a model of transformers, by the names in the base model's own files."""

import torch
from safetensors.torch import load_file
from torch import nn

from r1p_dist.backbones import Placement, load_llava, weights_identity
from r1p_dist.config import BackboneConfig
from r1p_dist.errors import InputError
from r1p_dist.kinds.llava.weights import files_of_weights


class LlavaWeights:
    """FrozenWeights of a LLaVA-style model of transformers. files: the weights' names, by the file they are in."""

    def __init__(self, config: BackboneConfig):
        """InputError: as `load_llava`, or a shape that has no weights of its own."""
        self.backbone = load_llava(config.name, placement=Placement(torch.device("meta")))
        paths = files_of_weights(config.name)
        if not paths:
            raise InputError(
                f"backbone.name={config.name}: is a shape with random weights, there is nothing to export; export a "
                "run of a model that has weights"
            )
        self.identity = weights_identity(config, self.backbone)
        self.files: dict[str, list[str]] = {}
        self._mapped: dict[str, torch.Tensor] = {}
        for path in paths:
            content = load_file(path)  # maps it
            self.files[path.name] = list(content)
            self._mapped |= content
        self.shapes = {name: tensor.shape for name, tensor in self._mapped.items()}
        own = {self.backbone.family.module_name(name): name for name in self._mapped}
        self._names: dict[nn.Parameter, str] = {
            parameter: own[name] for name, parameter in self.backbone.model.named_parameters()
        }

    def locate(self, weight: nn.Parameter, rows: slice | None) -> tuple[str, slice | None]:
        return self._names[weight], rows

    def read(self, name: str) -> torch.Tensor:
        return self._mapped[name]
