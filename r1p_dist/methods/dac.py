"""DAC, "Decomposing and Composing" (arXiv 2601.22828): a pool of rank-1 experts per linear layer."""

from collections.abc import Callable

import torch

from r1p_dist.adapters import AdaptedLinear, Factors, Routing
from r1p_dist.adapters.pool import share_votes
from r1p_dist.backbones import Slot
from r1p_dist.methods.method import Method


class Dac(Method):
    """DAC: each task trains a pool of rank-1 experts per linear, the most voted ones merge (arXiv 2601.22828).

    The loss is the contrastive one plus `ago.weight` times the AGO loss. Where the paper and its released code
    differ, the options `ago.reduction` and `pool.router_grad` name the choice.
    """

    sections = ("train", "targets", "pool", "ago")
    adapters: list[AdaptedLinear]

    def attach(self) -> list[AdaptedLinear]:
        pool, targets = self.config.pool, self.config.targets

        def make(slot: Slot, routing: Routing) -> AdaptedLinear:
            return AdaptedLinear(
                slot.linear,
                pool.rank,
                pool.alpha,
                pool.active,
                pool.merged,
                pool.dropout,
                guide=getattr(pool.guide, slot.tower),
                vote=pool.vote,
                dropout_kind=pool.dropout_kind,
                router_grad=pool.router_grad,
                rows=slot.rows,
                routing=routing,
            )

        return self.backbone.attach(make, targets.towers, targets.layers)

    def begin_task(self, index: int) -> None:
        for i, adapter in enumerate(self.adapters):
            adapter.reset(self.generator(index, i))

    def loss(self, model: Callable, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = self.backbone.loss(model, batch)
        terms = [adapter.ago for adapter in self.adapters if adapter.ago is not None]
        if not terms:
            return loss, {"ago": torch.zeros((), device=loss.device)}
        ago = torch.stack(terms).mean()
        if self.config.ago.reduction == "paper_mean":
            ago = ago / (self.config.pool.merged * self.adapters[0].orthogonal_to.shape[1])
        for adapter in self.adapters:
            adapter.ago = None
        return loss + self.config.ago.weight * ago, {"ago": ago.detach()}

    def end_step(self) -> None:
        share_votes(self.adapters)

    def unmerged_updates(self) -> list[list[Factors]]:
        return [[*adapter.merged, adapter.update(adapter.active)[0]] for adapter in self.adapters]

    def end_task(self) -> None:
        for adapter in self.adapters:
            if self.config.ago.reduction == "code_all":
                B = adapter.update(adapter.rank)[0].B
                past = adapter.orthogonal_to
                adapter.orthogonal_to = B if past is None else torch.cat([past, B], dim=1)
            adapter.merge()
        self._set_past()

    def restore_merged(self, updates: list[list[Factors]]) -> None:
        super().restore_merged(updates)
        if updates:
            self._set_past()

    def _set_past(self) -> None:
        """Sets the columns that the AGO loss of the next task is orthogonal to; `code_all` has its own."""
        for adapter in self.adapters:
            if self.config.ago.weight == 0:
                adapter.orthogonal_to = None
            elif self.config.ago.reduction != "code_all":
                adapter.orthogonal_to = adapter.past_B

    def state(self) -> dict[str, torch.Tensor]:
        state = super().state()
        if self.config.ago.reduction == "code_all":
            for adapter in self.adapters:
                past = adapter.orthogonal_to
                state[f"{adapter.name}.orthogonal_to"] = adapter.past_B[:, :0] if past is None else past
        return state

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        super().load_state(state)
        if self.config.ago.reduction == "code_all":
            for adapter in self.adapters:
                past = state[f"{adapter.name}.orthogonal_to"].to(adapter.past_B.device)
                adapter.orthogonal_to = past if past.shape[1] else None
