"""All that a method may ask of the training in progress; exact at every ZeRO stage, for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, Protocol

import torch

if TYPE_CHECKING:
    from r1p_dist.backbones.backbone import Batch

Gradients = dict[str, torch.Tensor]
Need = Literal["forward", "gradients", "samples", "sensitivity"]


class Watcher(Protocol):
    """What `Trainer.scan` shows batches to.

    needs: what is run for a micro batch: the model forwards, or also backwards from its loss, from each sample's part
    of it (`Backbone.sample_losses`), which costs a pass for each, or from a random projection of what it gives out
    (`Backbone.outputs`).
    """

    needs: Need

    def watch(self) -> AbstractContextManager:
        """Returns what is entered around the scan, for hooks."""
        ...

    def saw(self, gradients: Gradients | None) -> None:
        """Is told that a micro batch went through the model, or was gone back from for one sample; gradients: of its
        loss or of the sample's, where they are needed."""


class Trainer(Protocol):
    """The engine of one stage, as a method sees it. Names are those of `Method.trainable_parameters`."""

    step_number: int  # optimizer steps done in the stage
    lr: float  # the learning rate of the last step

    def backward(self, batch: Batch) -> None:
        """Runs the method's loss of one micro batch and its backward; each term is logged."""

    def backward_gradients(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Takes these, full and equal on every rank, as the gradient of the whole step, in place of `backward`."""

    def gradients(self, batch: Batch) -> Gradients:
        """Returns the full gradients, fp32, of the method's loss of one micro batch, the mean over ranks; the
        parameters keep none. Its terms are logged. Zeros where the loss does not depend on a parameter."""
        ...

    def update(self) -> None:
        """Makes the optimizer step, after one `backward` for each micro batch or one `backward_gradients`."""

    def edit(self, function: Callable[..., torch.Tensor], *columns: str, only: Collection[str] | None = None) -> None:
        """Replaces every trained value, or those of the parameters named by `only`, by function(value, *columns),
        elementwise; each rank does its parts.

        The optimizer's own fp32 values are edited, so that the next step goes on from them.
        """

    def edit_column(self, column: str, function: Callable[..., torch.Tensor], *columns: str) -> None:
        """Replaces a column of the method by function(column, value, *columns), elementwise."""

    def fill_column(self, column: str, values: Mapping[str, torch.Tensor]) -> None:
        """Sets a column of the method from full tensors."""

    def weights(self, column: str) -> AbstractContextManager:
        """Returns a context in which the model has a column's numbers for its trained values: a teacher."""
        ...

    def restart_moments(self) -> None:
        """Makes the optimizer forget: moments of zero, no step made; values and schedule stay."""

    def scan(self, *watchers: Watcher, batches: int | None = None, trained: bool = False) -> None:
        """Shows the stage's training samples to watchers without training: as many global batches as one epoch has, or
        `batches`.

        The model runs with merged weights alone, or with `trained` as in training: with what is being trained and
        without dropout or votes.
        """

    def next_batches(self, request: str) -> Sequence[Batch]:
        """Returns the micro batches of the step for a stream that `Method.further_data` asked for."""
        ...

    def past_memory(self) -> Sequence[Mapping[str, torch.Tensor]]:
        """Returns what `Method.memory` gave at the end of each finished stage; tensors are read when they are asked
        for."""
        ...

    def by_layer(self, layers: Iterable[str], compute: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns compute(layer) of every layer on every rank; each rank computes those that it owns."""
        ...
