"""DAC, "Decomposing and Composing" (arXiv 2601.22828): a pool of rank-1 experts per linear layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import model_validator

from r1p_dist.adapters import AdaptedLinear, Routing, Update
from r1p_dist.adapters.pool import share_votes
from r1p_dist.config import Count, NotNegative, Positive, Probability, RunConfig, Section
from r1p_dist.kinds import kind_of
from r1p_dist.protocol import Method, Stage, Trainer

if TYPE_CHECKING:
    from r1p_dist.backbones import Slot


class GuideOptions(Section):
    """Which vector of a layer's input the router reads, per tower; `cls_image`: the image tower's [CLS] for all."""

    image: Literal["auto", "first", "mean"] = "auto"
    """Of the image tower; `auto`: the [CLS] where there is one, else the mean."""
    text: Literal["auto", "first", "eot", "mean"] = "first"
    """Of a CLIP's text tower; `auto`: the token that it pools at, else the mean."""
    language: Literal["cls_image", "first", "mean", "last_prompt"] = "cls_image"
    """Of a LLaVA's language model."""
    projector: Literal["cls_image", "first", "mean"] = "cls_image"
    """Of a LLaVA's projector."""


class AgoOptions(Section):
    """The activation-guided orthogonal loss."""

    weight: NotNegative = 0.1
    """The paper's lambda; 0 switches it off."""
    reduction: Literal["sum_top", "paper_mean", "code_all"] = "sum_top"
    """Sum over pairs of merged columns, their mean as in the paper's formula, or all past columns as in its code."""


class Dac(Method):
    """DAC: each task trains a pool of rank-1 experts per linear, the most voted ones merge (arXiv 2601.22828).

    The loss is the contrastive one plus `ago.weight` times the mean of the layers' AGO terms. Where the paper and its
    released code differ, the options `ago.reduction` and `router_grad` name the choice.
    """

    paper = "arXiv 2601.22828"
    stores = "merged experts of each task; with ago.reduction=code_all every column that was trained"

    class Options(Section):
        """The pool of rank-1 experts of one adapted linear."""

        rank: Count = 12
        """Experts in the pool of each linear."""
        alpha: Positive = 1.0
        """The update's scaling is alpha / rank."""
        active: Count = 8
        """Experts that a batch uses: those with most votes."""
        merged: Count = 4
        """Experts that are merged at the end of a task: the most counted ones."""
        dropout: Probability = 0.0
        """Rate of the dropout on the update's input."""
        dropout_kind: Literal["element", "feature"] = "element"
        """Draw for every element, or once per batch for each input feature, at no cost."""
        guide: GuideOptions = GuideOptions()
        """Which vector of a layer's input the router reads."""
        router_grad: Literal["none", "straight_through", "gated"] = "none"
        """Whether the router learns: not, as in the released code, or by one of two ways of ours."""
        vote: Literal["global", "lagged", "local"] = "global"
        """Votes of all ranks in this step, of all ranks in the step before, or of this rank alone."""
        ago: AgoOptions = AgoOptions()
        """The activation-guided orthogonal loss."""

        @model_validator(mode="after")
        def _check_sizes(self) -> Dac.Options:
            if self.active > self.rank:
                raise ValueError(f"options.active={self.active} must not be larger than options.rank={self.rank}")
            if self.merged > self.active:
                raise ValueError(f"options.merged={self.merged} must not be larger than options.active={self.active}")
            return self

    tiny = {"rank": 4, "active": 3, "merged": 2}
    options: Options
    adapters: list[AdaptedLinear]

    @classmethod
    def check(cls, options: Dac.Options, config: RunConfig) -> None:
        even = kind_of(config.backbone.kind).even_towers
        if options.router_grad != "none" and not set(config.targets.towers or ()) <= set(even):
            raise ValueError(
                f"options.router_grad={options.router_grad}: only for towers of a {config.backbone.kind} backbone that "
                f"run as often on every rank; set targets.towers=[{','.join(even)}]"
            )

    def build(self) -> None:
        options, targets = self.options, self.config.targets

        def make(slot: Slot, routing: Routing) -> AdaptedLinear:
            return AdaptedLinear(
                slot.linear,
                options.rank,
                options.alpha,
                options.active,
                options.merged,
                options.dropout,
                guide=self.guide(slot.tower),
                vote=options.vote,
                dropout_kind=options.dropout_kind,
                router_grad=options.router_grad,
                rows=slot.rows,
                routing=routing,
            )

        self.adapters = self.backbone.attach(make, targets.towers, targets.layers)

    def guide(self, tower: str) -> str:
        """Returns which vector the routers of a tower read."""
        return getattr(self.options.guide, tower)

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        self.set_past(trainer.past_memory())

    def set_past(self, memories: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Sets the columns that the AGO loss is orthogonal to. memories: what `memory` returned in each past stage."""
        ago = self.options.ago
        for adapter in self.adapters:
            past = adapter.past_B
            if ago.reduction == "code_all":
                columns = [memory[f"{adapter.name}.B"].to(past.device) for memory in memories]
                past = torch.cat([past[:, :0], *columns], dim=1)
            adapter.orthogonal_to = past if ago.weight and past.shape[1] else None
            adapter.ago_weight = ago.weight / len(self.adapters)
            if ago.reduction == "paper_mean" and past.shape[1]:
                adapter.ago_weight /= self.options.merged * past.shape[1]

    def after_step(self, trainer: Trainer) -> None:
        share_votes(self.adapters)

    def trained(self) -> dict[str, Update]:
        return {adapter.name: adapter.update(adapter.active)[0] for adapter in self.adapters}

    def updates(self) -> dict[str, Update]:
        return {adapter.name: adapter.update(adapter.merge_count)[0] for adapter in self.adapters}

    def memory(self) -> dict[str, torch.Tensor]:
        if self.options.ago.reduction != "code_all":
            return {}
        return {f"{adapter.name}.B": adapter.update(adapter.rank)[0].B for adapter in self.adapters}
