"""Ours: a low-rank update per task, penalised by what it does to the inputs of the tasks before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from r1p_dist.adapters import Factors, LoRALinear
from r1p_dist.adapters.low_rank import LayerPlan, full_values
from r1p_dist.backbones import weights_identity
from r1p_dist.config import Count, FilePlace, NotNegative, Positive
from r1p_dist.distributed import agree, gathered, owner, rank, sum_over_ranks
from r1p_dist.moments.file import MomentFile
from r1p_dist.moments.sketch import Sketch
from r1p_dist.moments.whitening import Whitening
from r1p_dist.protocol import InputMoments, LowRankMethod, LowRankOptions, Stage, Trainer

if TYPE_CHECKING:
    from r1p_dist.data import Stream

Moment = torch.Tensor | Sketch


class MetricLinear(LoRALinear):
    """A LoRA B A R with a penalty s^2 tr(A R C R A^T B^T B), the mean squared change of the output on past inputs.

    C is the moment of these inputs. whitening: R, (in, in); None, as long as no inputs are known, is the identity.
    scale: what the penalty is multiplied by.
    """

    whitening: Whitening | None = None
    scale = 0.0
    held, left = 0, 0  # as `LayerPlan` has them

    @staticmethod
    def factors(adapters: Sequence[MetricLinear], x: torch.Tensor, votes: None) -> list[Factors]:
        As: list[torch.Tensor] = [adapter.A for adapter in adapters]
        whitening = adapters[0].whitening  # one input, one R
        if whitening is not None:
            whole = whitening.times(torch.cat(As).float()).to(As[0].dtype)
            As = list(whole.split([len(A) for A in As]))
        return [Factors(A, adapter.B, adapter.scaling) for A, adapter in zip(As, adapters, strict=True)]

    def penalty(self, factors: Factors) -> dict[str, torch.Tensor]:
        """Returns scale * s^2 tr(A R C R A^T B^T B); see `Steady`."""
        if self.whitening is None:
            return {}
        A, B = self.A.float(), factors.B.float()
        # where it is rounded, what the moment subtracts would not fit
        AR = factors.A if factors.A.dtype == torch.float32 else self.whitening.times(A)
        change = (self.whitening.moment(A, AR) * (B.T @ B)).sum()
        return {"inputs": self.scale * factors.scaling**2 * change}

    def update(self) -> Factors:
        A, B = full_values(self.A, self.B)
        return Factors(A if self.whitening is None else self.whitening.times(A), B, self.scaling)

    def plan(self) -> LayerPlan:
        return replace(super().plan(), held=self.held, left=self.left)


class Steady(LowRankMethod):
    """A fresh low-rank update per task, held to what leaves past inputs' outputs alone; all of it is merged (ours).

    The loss adds weight * mean over linears of s^2 tr(A C A^T B^T B) / tr(W C W^T): the expected squared change of a
    layer's output on past inputs, against that output itself. C is the mean over past tasks of the second moment of the
    layer's input, so a step costs the same after any number; DAC's AGO loss, which keeps new columns of B orthogonal to
    merged ones, is its counterpart without data. What the penalty covers is what is merged, so that nothing is lost
    at the merge.

    The update is B A R with R about C^(-1/2) (`Whitening`). Adam's steps on A are about alike in all directions; behind
    R they are large in those that past inputs hardly use, and the penalty is about alike in all. K-FAC (arXiv
    1503.05671) has such a factor, of the inputs that are trained on. No past picture or prompt is kept. An anchor,
    moments of data like those of the backbone's own pretraining, counts as past tasks from the first one on; DAC claims
    to need no such knowledge, and without one the first task is not held to anything.
    """

    stores = "a second moment (in, in), or a sketch of it, per layer input"
    layer = MetricLinear
    tiny = {"rank": 4, "batches": 2, "weight": 10.0}
    adapters: list[MetricLinear]
    _anchor: MomentFile | None = None

    class Options(LowRankOptions):
        """Options of Steady."""

        weight: NotNegative = 1e4
        """Of the penalty: mu."""
        ridge: Annotated[Positive, Field(le=1)] = 1e-2
        """What each direction counts as in R beside past inputs' energy in it, in units of the mean over directions."""
        by_sensitivity: bool = True
        """Weigh tokens of past inputs by how much the model's output depends on them; else all real ones alike."""
        batches: Count | None = None
        """Global batches that a task's inputs are measured on; null: an epoch."""
        sketch: Count = 256
        """Directions kept of the moment of an input wider than `sketch_above`, and of R; the rest as one number."""
        sketch_above: Count = 2048
        """Width of a layer's input up to which its moment is kept whole, and R."""
        anchor: FilePlace | None = None
        """File of `r1p moments`, or a shipped backbone that has one (tiny); null: none."""
        anchor_tasks: NotNegative = 6.0
        """As how many past tasks the anchor counts."""

    options: Options

    def build(self) -> None:
        super().build()
        for adapter in self.adapters:
            width, is_wide = adapter.in_features, adapter.in_features > self.options.sketch_above
            directions = min(self.options.sketch, width) if is_wide else width
            adapter.left = directions * width + (1 if is_wide else 0)
            adapter.held = directions * width

    def stages(self, stream: Stream) -> list[Stage]:
        if self.options.anchor is not None and self.options.anchor_tasks:
            self._anchor = MomentFile(self.options.anchor)
            self._anchor.check(agree(lambda: weights_identity(self.config.backbone, self.backbone)))
        return super().stages(stream)

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        self._past = trainer.past_memory()
        if not self._past and self._anchor is None:
            return
        layers = self._inputs().layers
        place = {adapter.name: number for number, adapter in enumerate(self.adapters)}
        made: dict[str, Whitening] = {}
        # of each adapter tr(W C W^T), and of R the numbers, from the rank that owns the layer's input
        numbers = torch.zeros(len(self.adapters), 4, dtype=torch.float64)
        for number, (layer, names) in enumerate(layers.items()):
            moment = self._known_moment(layer) if rank() == owner(number) else None
            if moment is not None:
                made[layer] = Whitening.of(moment, self.options.ridge)
            readers = [self.adapters[place[name]] for name in names]
            with gathered({adapter.linear.weight: None for adapter in readers}):  # q, k and v may be rows of one
                if moment is not None:
                    found = made[layer]
                    for name, adapter in zip(names, readers, strict=True):
                        sizes = [_size(adapter, moment), found.gain, found.span, found.ridge]
                        numbers[place[name]] = torch.tensor(sizes, dtype=torch.float64)
        rows = sum_over_ranks(numbers).tolist()
        for layer, matrix in trainer.by_layer(layers, lambda layer: made[layer].matrix).items():
            for name in layers[layer]:
                adapter, (size, *of_root) = self.adapters[place[name]], rows[place[name]]
                adapter.whitening = Whitening(matrix, *of_root)
                adapter.scale = self.options.weight / (size * len(self.adapters)) if size else 0.0

    def _known_moment(self, layer: str) -> Moment:
        """Returns the mean of past tasks' moments, of which the anchor is some."""
        known = [_stored(task, layer) for task in self._past]
        weights = [1.0] * len(known)
        if self._anchor is not None:
            known.append(self._anchor.sketch(layer))
            weights.append(self.options.anchor_tasks)
        known = [moment.to(self.backbone.device) for moment in known]
        sketches = [moment for moment in known if isinstance(moment, Sketch)]
        if len(sketches) == len(known) and len(sketches[0].factor) > self.options.sketch_above:
            return Sketch.mean(sketches, weights, self.options.sketch)
        wholes = [moment.whole() if isinstance(moment, Sketch) else moment for moment in known]
        total = torch.zeros_like(wholes[0])
        for weight, whole in zip(weights, wholes, strict=True):
            total += weight / sum(weights) * whole
        return total

    def end(self, stage: Stage, trainer: Trainer) -> None:
        inputs = self._inputs()
        trainer.scan(inputs, batches=self.options.batches, trained=True)
        self._memory = {}
        for layer, moment in inputs.moments.items():
            if len(moment) > self.options.sketch_above:
                sketch = Sketch.of(moment, self.options.sketch)
                self._memory |= {f"{layer}.factor": sketch.factor, f"{layer}.rest": sketch.rest}
            else:
                self._memory[f"{layer}.moment"] = moment

    def memory(self) -> dict[str, torch.Tensor]:
        """Returns of each layer's input the stage's second moment; of the stage alone, so that it can be forgotten."""
        return self._memory

    def _inputs(self) -> InputMoments:
        return InputMoments(self.backbone, self.adapters, self.options.by_sensitivity)


def _stored(memory: Mapping[str, torch.Tensor], layer: str) -> Moment:
    """Returns what a stage left of the input that a layer reads."""
    if f"{layer}.moment" in memory:
        return memory[f"{layer}.moment"]
    return Sketch(memory[f"{layer}.factor"], memory[f"{layer}.rest"])


@torch.no_grad()
def _size(adapter: MetricLinear, moment: Moment) -> float:
    """Returns tr(W C W^T) of the adapter's rows: the mean squared output of the layer on past inputs."""
    W = adapter.linear.weight[adapter.rows].float()
    WC = moment.times(W) if isinstance(moment, Sketch) else W @ moment
    return float((WC * W).sum())
