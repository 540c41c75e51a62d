"""The backbone that a run's configuration names; the libraries of other kinds are not imported."""

from pathlib import Path
from typing import Protocol

from r1p_dist.backbones.backbone import Backbone
from r1p_dist.backbones.weights import Placement
from r1p_dist.config import BackboneConfig
from r1p_dist.kinds import kind_of


class BackbonePart(Protocol):
    """What the part `backbone` of a kind holds."""

    def load(self, config: BackboneConfig, placement: Placement | None, compiles: bool) -> Backbone:
        """As `load_backbone`."""

    def weights_files(self, config: BackboneConfig) -> list[Path]:
        """Returns the files that the weights come from; none: they are random."""


def backbone_part(config: BackboneConfig) -> BackbonePart:
    """Returns the part of the kind of backbone that a configuration names."""
    return kind_of(config.kind).part("backbone")


def load_backbone(config: BackboneConfig, placement: Placement | None = None, compiles: bool = False) -> Backbone:
    """Loads the backbone that a run's configuration names.

    placement: where the weights go; on the CPU in fp32 by default. compiles: the blocks' training forward, by
    torch.compile. InputError: a model that cannot be had or used.
    """
    return backbone_part(config).load(config, placement, compiles)
