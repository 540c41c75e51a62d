"""AdaptedLinear: a frozen linear layer with a pool of rank-1 experts (DAC, arXiv 2601.22828)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from r1p_dist.adapters.low_rank import LayerPlan, LowRankLinear, fill_uniform, full_values
from r1p_dist.adapters.merged_weight import Factors
from r1p_dist.adapters.recomputing import is_recomputing, once
from r1p_dist.distributed import gathered, sum_over_ranks, sum_over_ranks_with_gradient, world_size
from r1p_dist.errors import InputError
from r1p_dist.losses import ago_term


@dataclass
class Routing:
    """What the routers of one tower must know of the batch beside the layer's input; None where it does not apply."""

    weights: torch.Tensor | None = None  # (batch,) how often each sample occurs, int64; None = once
    end: torch.Tensor | None = None  # (batch,) position of the end-of-text token, or of the last one of the prompt
    padding: torch.Tensor | None = None  # (batch, tokens) True at tokens that the mean is taken over
    real: torch.Tensor | None = None  # (batch, tokens) False at padding; a decoder's answers are real, too
    # (batch, tokens) where each token of a sample is, of all samples packed in one row (1, tokens of all, in)
    places: torch.Tensor | None = None
    lengths: list[int] | None = None  # tokens of each sample, where the input is all samples' in one row, (tokens, in)
    guide: torch.Tensor | None = None  # (batch, guide_width) the guide `cls_image`
    guide_width: int = 0
    auto: str = "first"  # the guide that `auto` stands for
    has_voted: bool = False  # `vote_ahead` has taken the vote of this batch


class Router(nn.Linear):
    """Scores a guide for each expert, in its own precision: another one's may be that of a tower or of autocast."""

    def forward(self, guide: torch.Tensor) -> torch.Tensor:
        # here and not before: ZeRO-3 gathers a weight for whoever looks at it, and only here is it gathered anyway
        return super().forward(guide.to(self.weight.dtype))


class AdaptedLinear(LowRankLinear):
    """A frozen linear plus a pool of `rank` rank-1 experts.

    Expert j is row a_j of A and column b_j of B; its update is scaling * b_j a_j^T, scaling = alpha / rank.
    In training each sample votes for its `active` best experts, by a router that reads the guide, and the `active`
    experts with most votes are used by the whole batch. `merge` adds the `merged` most counted ones to the frozen
    weight; eval uses that weight alone.

    linear: the layer to freeze. dropout, dropout_kind: on the input of the update, as in `LowRankLinear`. guide:
    `first`, `eot`, `last_prompt` or `mean` token of the input, `cls_image`, a vector from elsewhere that the routing
    holds, or `auto`, the one that the routing names. vote: `global` sums the votes over ranks while the frozen product
    runs; `lagged` uses the sum over ranks of the step before (the first step of a task votes as `global` does);
    `local` does not sum, so ranks can use different experts. router_grad: `none` (the paper's released code: routing
    is a fixed random projection), `straight_through` or `gated` (ours: M_j = active * q_j / sum of q over the active
    experts).
    rows, routing: given by the model's side for parts of a fused projection and for what a tower's guide needs.
    Raises InputError where rank, active and merged do not fit each other or the layer.
    Source: DAC's released code, layers.py; the options `guide` and `router_grad` are ours.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int = 12,
        alpha: float = 1.0,
        active: int = 8,
        merged: int = 4,
        dropout: float = 0.0,
        guide: str = "first",
        vote: str = "global",
        *,
        dropout_kind: str = "element",
        router_grad: str = "none",
        rows: slice | None = None,
        routing: Routing | None = None,
    ):
        super().__init__(linear, alpha / rank, dropout, dropout_kind, rows)
        if not 1 <= merged <= active <= rank:
            raise InputError(
                f"options: needs 1 <= merged <= active <= rank, got merged={merged}, active={active}, rank={rank}"
            )
        if rank > min(self.in_features, self.out_features):
            raise InputError(
                f"options.rank={rank} is larger than a layer of {self.in_features} by {self.out_features}; "
                f"use at most {min(self.in_features, self.out_features)}"
            )
        self.rank, self.active, self.merge_count = rank, active, merged
        self.routing = routing or Routing()
        self.guide = self.routing.auto if guide == "auto" else guide
        self.vote, self.router_grad = vote, router_grad
        weight = linear.weight
        self.A = nn.Parameter(weight.new_empty(rank, self.in_features))
        self.B = nn.Parameter(weight.new_empty(self.out_features, rank))
        guide_width = self.routing.guide_width if self.guide == "cls_image" else self.in_features
        self.router = Router(guide_width, rank, device=weight.device, dtype=weight.dtype)
        self.router.requires_grad_(router_grad != "none")
        self.register_buffer("activation_counts", torch.zeros(rank, dtype=torch.int64, device=weight.device))
        self.register_buffer("gate_sum", torch.zeros(rank, dtype=torch.float64, device=weight.device))
        self.register_buffer("gate_steps", torch.zeros((), dtype=torch.int64, device=weight.device), persistent=False)
        # votes of this step that `share_votes` has yet to sum over ranks
        self.register_buffer("pending_votes", torch.zeros_like(self.activation_counts), persistent=False)
        self.orthogonal_to: torch.Tensor | None = None  # columns (out, n) of past tasks for the AGO loss; None = off
        self.ago_weight = 1.0
        self._active: torch.Tensor | None = None  # the experts in use; None until the first vote of a task
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Begins a task with fresh experts (B zero), router and counts; a collective under ZeRO-3."""
        bound, router_bound = 1 / math.sqrt(self.in_features), 1 / math.sqrt(self.router.in_features)
        with gathered(self.parameters(recurse=False), modify=True), gathered(self.router.parameters(), modify=True):
            fill_uniform(self.A, bound, generator)  # Kaiming-uniform with a = sqrt(5)
            nn.init.zeros_(self.B)
            fill_uniform(self.router.weight, router_bound, generator)
            fill_uniform(self.router.bias, router_bound, generator)
        for state in (self.activation_counts, self.gate_sum, self.gate_steps, self.pending_votes):
            state.zero_()
        self._active, self._shared = None, False

    def state(self) -> dict[str, torch.Tensor]:
        active = self._active if self._active is not None else self.activation_counts[:0]
        return {
            "activation_counts": self.activation_counts,
            "gate_sum": self.gate_sum,
            "gate_steps": self.gate_steps,
            "active": active,  # lagged votes: chosen by the last step, for the next one
            "is_shared": torch.tensor(self._shared),
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.activation_counts.copy_(state["activation_counts"])
        self.gate_sum = state["gate_sum"].to(self.gate_sum.device)
        self.gate_steps.copy_(state["gate_steps"])
        self._shared = bool(state["is_shared"])
        self._active = state["active"].to(self.activation_counts.device) if len(state["active"]) else None

    def guide_vector(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the router's input (batch, in or guide_width) from the layer's input, (batch, tokens, in) or packed.

        Rows and columns of a picture may stand in place of the tokens; without any, (batch, in), a sample is its own
        guide. Packed: (tokens, in), the routing has the samples' lengths.
        """
        if self.guide == "cls_image":
            return self.routing.guide
        if self.routing.lengths is not None:
            samples = x.split(self.routing.lengths)
            return torch.stack([sample[0] if self.guide == "first" else sample.mean(0) for sample in samples])
        if self.routing.places is not None:
            return self._guide_of_packed(x.flatten(0, -2), self.routing.places)
        padding = self.routing.padding
        if x.dim() == 2 and padding is not None and len(x) == padding.numel():
            x = x.unflatten(0, padding.shape)  # a mixture of experts sees the tokens of all samples in one row
        x = x.flatten(1, -2) if x.dim() > 2 else x[:, None]
        if self.guide == "first":
            return x[:, 0]
        # linears chosen by their names can be of towers that see something else than the tokens, a picture's patches
        is_other = padding is not None and padding.shape != x.shape[:2]
        if self.guide in ("eot", "last_prompt"):
            return x[:, -1] if is_other else x[torch.arange(len(x), device=x.device), self.routing.end]
        if padding is None or is_other:
            return x.mean(1)
        return self._mean(x)

    def _guide_of_packed(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """x (tokens of all, in); places (batch, tokens)."""
        if self.guide == "first":
            return x[places[:, 0]]
        if self.guide in ("eot", "last_prompt"):
            return x[places[torch.arange(len(places), device=x.device), self.routing.end]]
        return self._mean(x[places])

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        real = self.routing.padding.to(x.dtype)[..., None]
        return (x * real).sum(1) / real.sum(1)

    @staticmethod
    @torch.no_grad()
    def votes(adapters: Sequence["AdaptedLinear"], x: torch.Tensor) -> torch.Tensor | None:
        """Returns this rank's votes (adapters, rank), int64, where they must be summed over ranks before their use."""
        # activation checkpointing or a method runs the forward again: the vote stands
        if is_recomputing() or adapters[0].is_recorded or adapters[0].routing.has_voted:
            return None
        return _count_votes(adapters, adapters[0].guide_vector(x.detach()))

    @staticmethod
    def factors(adapters: Sequence["AdaptedLinear"], x: torch.Tensor, votes: torch.Tensor | None) -> list[Factors]:
        """Returns the experts in use; all of them, weighted, where the router's gradient needs the others too."""
        if votes is not None:
            _elect(adapters, votes)
        if adapters[0].router_grad == "none":
            return [Factors(adapter.A, adapter.B, adapter.scaling, adapter._active) for adapter in adapters]
        return [Factors(adapter._mask(x)[:, None] * adapter.A, adapter.B, adapter.scaling) for adapter in adapters]

    def _mask(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the weight of each expert in this batch, (rank,), with the router's gradient."""
        chosen = torch.zeros(self.rank, dtype=self.A.dtype, device=x.device)
        chosen[self._active] = 1
        probabilities = self.router(self.guide_vector(x)).softmax(-1)  # (batch, rank)
        weights = (
            self.routing.weights
            if self.routing.weights is not None
            else torch.ones(len(probabilities), device=x.device)
        )
        mean = (weights[:, None] * probabilities).sum(0) / weights.sum()
        if self.vote != "local":
            mean = sum_over_ranks_with_gradient(mean) / world_size()
        if self.router_grad == "straight_through":
            return chosen + (mean - mean.detach())
        gate = chosen * self.active * mean / (chosen * mean).sum()
        if not self.is_recorded and not is_recomputing():
            # DeepSpeed casts floating-point buffers to the model's precision; a sum of a task's gates needs its own
            self.gate_sum = self.gate_sum.double() + once(gate.detach())
            self.gate_steps += once(1)
        return gate

    def penalty(self, factors: Factors) -> dict[str, torch.Tensor]:
        """Returns `ago_weight` times the AGO term of the most counted columns, where there are past ones."""
        if self.orthogonal_to is None:
            return {}
        current = self.B[:, top(self.activation_counts, self.merge_count)]
        return {"ago": self.ago_weight * ago_term(current, self.orthogonal_to.to(current.dtype))}

    def plan(self) -> LayerPlan:
        # the parts of a fused projection share its linear and its input; a whole tower can vote ahead
        voters = self.routing if self.routing.has_voted else self.linear
        gate_bytes = 0
        if self.router_grad != "none":
            # samples without counts have ones that are fp32
            gate_bytes = self.rank * (4 if self.routing.weights is None else self.A.element_size())
        return LayerPlan(self.merge_count, self.vote, voters, gate_bytes)

    def update(self, count: int) -> tuple[Factors, torch.Tensor]:
        """Returns the `count` most counted experts as an update, and their indices; a collective under ZeRO-3."""
        chosen = top(self.activation_counts, count)
        A, B = full_values(self.A, self.B)
        if self.router_grad == "gated" and self.gate_steps:
            A = A * (self.gate_sum / self.gate_steps).float()[:, None]
        return Factors(A[chosen], B[:, chosen], self.scaling), chosen

    def merge(self) -> torch.Tensor:
        """Merges the most counted experts into the frozen weight and returns their indices, most counted first."""
        update, chosen = self.update(self.merge_count)
        self.merge_update(update)
        return chosen


def _count_votes(adapters: Sequence[AdaptedLinear], guide: torch.Tensor) -> torch.Tensor | None:
    """Returns this rank's votes (adapters, rank), int64, where they must be summed over ranks before their use.

    guide (batch, width): what the routers of these adapters read.
    """
    first = adapters[0]
    scores = torch.stack([adapter.router(guide) for adapter in adapters])  # (adapters, batch, rank)
    ballots = torch.zeros(scores.shape, dtype=torch.int64, device=guide.device)
    ballots.scatter_(2, top(scores, first.active), 1)
    if first.routing.weights is not None:
        ballots *= first.routing.weights[:, None]
    votes = ballots.sum(1)
    if first.vote == "global":
        return votes
    for adapter, vote in zip(adapters, votes, strict=True):
        adapter.pending_votes += once(vote)
    if first.vote == "lagged":
        return None if first._shared else votes
    _choose(adapters, votes)
    return None


def _elect(adapters: Sequence[AdaptedLinear], votes: torch.Tensor) -> None:
    """Makes the experts with most votes those in use; votes (adapters, rank), summed over ranks where that is due."""
    _choose(adapters, votes)
    if adapters[0].vote == "global":
        for adapter, vote in zip(adapters, votes, strict=True):
            adapter.activation_counts += once(vote)


@torch.no_grad()
def vote_ahead(adapters: Sequence[AdaptedLinear]) -> None:
    """Lets all adapters of one routing vote before any of them runs, with one sum over ranks for all of them.

    For the guide `cls_image` alone, which is known by then.
    """
    if not adapters[0].is_recorded:
        votes = _count_votes(adapters, adapters[0].guide_vector(adapters[0].routing.guide))
        if votes is not None:
            _elect(adapters, sum_over_ranks(votes))
    adapters[0].routing.has_voted = True


def top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the indices of the `count` largest scores of the last dimension, largest first; ties: the lower index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _choose(adapters: Sequence[AdaptedLinear], votes: torch.Tensor) -> None:
    for adapter, chosen in zip(adapters, top(votes, adapters[0].active), strict=True):
        adapter._active = chosen


def share_votes(adapters: Sequence[AdaptedLinear]) -> None:
    """Ends a step: sums the votes of `lagged` and `local` mode over ranks, all layers in one collective.

    They enter the activation counts, and in `lagged` mode choose the experts of the next step.
    """
    adapters = [adapter for adapter in adapters if adapter.vote != "global"]
    if not adapters:
        return
    votes = sum_over_ranks(torch.cat([adapter.pending_votes for adapter in adapters]))
    for adapter, vote in zip(adapters, votes.split([adapter.rank for adapter in adapters]), strict=True):
        adapter.activation_counts += vote
        adapter.pending_votes.zero_()
        if adapter.vote == "lagged":
            adapter._active, adapter._shared = top(vote, adapter.active), True
