"""The protocol between a run and its backbone: the training loop and the methods know this, never a model by name."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import nn

from r1p_dist.adapters import LowRankLinear, Routing
from r1p_dist.backbones.slots import Slot
from r1p_dist.config import DataConfig, TrainConfig
from r1p_dist.data import Encoder, Stream

Batch = dict[str, torch.Tensor]


class Backbone(Protocol):
    """A frozen model, an nn.Module, whose linears adapters can serve."""

    kind: str  # as in the configuration
    routing: dict[str, Routing]

    @property
    def device(self) -> torch.device: ...

    def attach(
        self, make: Callable[[Slot, Routing], LowRankLinear], towers: Sequence[str], layers: Sequence[str]
    ) -> list[LowRankLinear]:
        """Puts `make(slot, routing)` on the chosen linears; returns the adapters in a fixed order."""

    def check(self, stream: Stream) -> None:
        """Raises InputError for a stream or a model that `loss` does not fit, before any training."""

    def encoder(self, data: DataConfig) -> Encoder:
        """Returns what makes batches of samples."""

    def preparer(self, prompts: Sequence[str]) -> Callable[[Batch], Batch]:
        """Returns what gives a micro batch, on the host, what the host knows of it beside.

        prompts: of each label of its samples; of classification tasks alone.
        """

    def begin_step(self, batches: Sequence[Batch], train: TrainConfig) -> None:
        """Is told the micro batches of the coming optimizer step, on the device, before the loss of any."""

    def loss(self, model: Callable, batch: Batch) -> torch.Tensor:
        """Returns this rank's part of a micro batch's loss: the mean over ranks and micro batches is the global loss.

        model: the backbone, or the DeepSpeed engine around it.
        """

    def sample_losses(self, model: Callable, batch: Batch) -> torch.Tensor:
        """Returns the parts (n,) of this rank's samples in what `loss` is the mean of; as many on every rank."""
        ...

    def outputs(self, model: Callable, batch: Batch) -> list[torch.Tensor]:
        """Returns what the model gives out for a micro batch, a row for each sample, prompt or token that counts.

        No row depends on another's sample. model: as for `loss`.
        """

    def tower_parameters(self, towers: Sequence[str]) -> dict[str, nn.Parameter]:
        """Returns the weights of towers by their names in `named_parameters`."""

    def train(self, mode: bool = True) -> nn.Module: ...

    def eval(self) -> nn.Module: ...

    def parameters(self) -> Sequence[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
