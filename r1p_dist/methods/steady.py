"""Ours: a low-rank update per task, penalised by what it does to the inputs of the tasks before it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from r1p_dist.adapters import Factors, LoRALinear
from r1p_dist.adapters.low_rank import full_values
from r1p_dist.backbones import weights_identity
from r1p_dist.config import Count, FilePlace, NotNegative, Share
from r1p_dist.distributed import agree, gathered, owner, rank, sum_over_ranks
from r1p_dist.errors import InputError
from r1p_dist.moments.file import MomentFile
from r1p_dist.moments.sketch import Sketch
from r1p_dist.moments.whitening import Whitening
from r1p_dist.protocol import (
    BoundaryPlan,
    InputMoments,
    InputPlan,
    LowRankMethod,
    LowRankOptions,
    MomentPlan,
    Sketching,
    Stage,
    Trainer,
)

if TYPE_CHECKING:
    from r1p_dist.data import Stream

Moment = torch.Tensor | Sketch

_NUMBERS = 7  # of each adapter: tr(W C W^T G), and the numbers of R and of L


class MetricLinear(LoRALinear):
    """A LoRA L B A R with a penalty s^2 tr(A R C R A^T B^T L G L B) on what it does to past inputs.

    C is the moment of these inputs, G that of the gradients at the output on them. whitening: R, (in, in), outer: L,
    (out, out), None: the identity, without a penalty where no inputs are known, with G = I where no gradients are.
    scale: what the penalty is multiplied by.
    """

    whitening: Whitening | None = None
    outer: Whitening | None = None
    scale = 0.0

    @staticmethod
    def factors(adapters: Sequence[MetricLinear], x: torch.Tensor, votes: None) -> list[Factors]:
        As: list[torch.Tensor] = [adapter.A for adapter in adapters]
        whitening = adapters[0].whitening  # one input, one R
        if whitening is not None:
            whole = whitening.times(torch.cat(As).float()).to(As[0].dtype)
            As = list(whole.split([len(A) for A in As]))
        return [
            Factors(A, adapter._turned(adapter.B), adapter.scaling) for A, adapter in zip(As, adapters, strict=True)
        ]

    def _turned(self, B: torch.Tensor) -> torch.Tensor:
        """Returns L B."""
        return B if self.outer is None else self.outer.times(B.T.float()).T.to(B.dtype)

    def penalty(self, factors: Factors) -> dict[str, torch.Tensor]:
        """Returns scale * s^2 tr(A R C R A^T B^T L G L B); see `Steady`."""
        if self.whitening is None:
            return {}
        A, B, AR, BL = self.A.float(), self.B.float(), factors.A, factors.B.T
        if AR.dtype != torch.float32:  # where it is rounded, what the moments subtract would not fit
            AR, BL = self.whitening.times(A), self._turned(B).T
        outputs = BL @ BL.T if self.outer is None else self.outer.moment(B.T, BL)
        change = (self.whitening.moment(A, AR) * outputs).sum()
        return {"inputs": self.scale * factors.scaling**2 * change}

    def update(self) -> Factors:
        A, B = full_values(self.A, self.B)
        return Factors(A if self.whitening is None else self.whitening.times(A), self._turned(B), self.scaling)


class Steady(LowRankMethod):
    """A fresh low-rank update per task, held to what leaves past outputs alone; all of it is merged (ours).

    The loss adds weight * mean over linears of s^2 tr(A C A^T B^T G B) / tr(W C W^T G): the expected squared change of
    a layer's output on past inputs, in the directions that the model's output depends on, against that output itself.
    C is the mean over past tasks of the second moment of the layer's input, G that of the gradients at its output (of
    a random projection of what the model gives out), so a step costs the same after any number of tasks; DAC's AGO
    loss, which keeps new columns of B orthogonal to merged ones, is its counterpart without data. What the penalty
    covers is what is merged, so that nothing is lost at the merge.

    The update is L B A R with R about C^(-1/2) and L about G^(-1/2) (`Whitening`). Adam's steps on A and B are about
    alike in all directions; behind R and L they are large in those that the past hardly uses, and the penalty is about
    alike in all. K-FAC (arXiv 1503.05671) has such factors, of what is trained on. No past picture or prompt is kept.
    An anchor, moments of data like those of the backbone's own pretraining or of noise, counts as past tasks from the
    first one on; DAC claims to need no such knowledge, and without one the first task is not held to anything.
    """

    stores = "second moments, or sketches of them: (in, in) per layer input and (out, out) per layer"
    layer = MetricLinear
    tiny = {"rank": 4, "batches": 2, "weight": 1e3, "ridge": 1.0, "outer_ridge": 1.0}
    adapters: list[MetricLinear]
    _anchor: MomentFile | None = None

    class Options(LowRankOptions):
        """Options of Steady."""

        weight: NotNegative = 1e4
        """Of the penalty: mu."""
        ridge: Share = 1e-2
        """What each direction counts as in R beside past inputs' energy in it, in units of the mean over directions."""
        outer_ridge: Share | None = None
        """The same in L; null: L and G are I. Without an anchor, let `batches` be many: G has as many directions."""
        by_sensitivity: bool = True
        """Weigh tokens of past inputs by how much the model's output depends on them; else all real ones alike."""
        batches: Count | None = None
        """Global batches that a task's inputs are measured on; null: an epoch."""
        sketch: Count = 256
        """Directions kept of a moment of gradients, of that of an input wider than `sketch_above`, and of L and R."""
        sketch_above: Count = 2048
        """Width of a layer's input up to which its moment is kept whole, and R."""
        anchor: FilePlace | None = None
        """File of `r1p moments`, or a shipped backbone that has one (tiny); null: none."""
        anchor_tasks: NotNegative = 6.0
        """As how many past tasks the anchor counts."""

    options: Options

    def build(self) -> None:
        super().build()
        self._by_name = {adapter.name: adapter for adapter in self.adapters}

    def _inner_shape(self, adapter: MetricLinear) -> tuple[int, int]:
        """Returns the shape of R's matrix, and of what is kept of the moment of the input."""
        width = adapter.in_features
        return width, min(self.options.sketch, width) if width > self.options.sketch_above else width

    def _outer_shape(self, adapter: MetricLinear) -> tuple[int, int]:
        """Returns the shape of the factor of the sketch of G, and of L's matrix."""
        return adapter.out_features, min(self.options.sketch, adapter.out_features)

    def stages(self, stream: Stream) -> list[Stage]:
        if self.options.anchor is not None and self.options.anchor_tasks:
            self._anchor = MomentFile(self.options.anchor)
            identity = agree(lambda: weights_identity(self.config.backbone, self.backbone))
            self._anchor.check(identity, self._by_name, self.options.outer_ridge is not None)
        elif self.options.outer_ridge is not None and rank() == 0:
            logging.getLogger(__name__).warning(
                "options.outer_ridge without an anchor: the gradients of a task span few directions of the last "
                "layers, and all others count as free; set options.anchor (r1p moments --noise makes one), or "
                "options.outer_ridge=null"
            )
        return super().stages(stream)

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        self._past = trainer.past_memory()
        if not self._past and self._anchor is None:
            return
        self._check_past()
        layers, outer_ridge = self._watcher().layers, self.options.outer_ridge
        # of a layer's input and of its adapters, on the rank that owns the input
        moments = {layer: self._known_moment(layer) for number, layer in enumerate(layers) if rank() == owner(number)}
        inner = {layer: Whitening.of(moment, self.options.ridge) for layer, moment in moments.items()}
        gradients, outer = dict[str, Sketch](), dict[str, Whitening]()
        if outer_ridge is not None:
            gradients = {name: self._known_gradient(name) for layer in moments for name in layers[layer]}
            outer = {name: Whitening.of(known, outer_ridge) for name, known in gradients.items()}
        numbers = self._numbers(layers, moments, gradients, inner, outer)
        for layer, matrix in trainer.by_layer(layers, lambda layer: inner[layer].matrix).items():
            for name in layers[layer]:
                adapter, (size, *of_R, _, _, _) = self._by_name[name], numbers[name]
                adapter.whitening = Whitening(matrix, *of_R)
                adapter.scale = self.options.weight / (size * len(self.adapters)) if size else 0.0
        if outer_ridge is not None:
            for name, matrix in self._outer_matrices(layers, outer, trainer):
                self._by_name[name].outer = Whitening(matrix, *numbers[name][4:])

    def _check_past(self) -> None:
        """Refuses to go on from tasks that left less than L needs."""
        outer_ridge, first = self.options.outer_ridge, f"{self.adapters[0].name}.gradient.rest"
        if outer_ridge is not None and not all(first in task for task in self._past):
            raise InputError(
                f"options.outer_ridge={outer_ridge}: an earlier task left no moments of gradients, as with "
                "options.outer_ridge=null, which goes on from it"
            )

    def _numbers(
        self,
        layers: Mapping[str, Sequence[str]],
        moments: Mapping[str, Moment],
        gradients: Mapping[str, Sketch],
        inner: Mapping[str, Whitening],
        outer: Mapping[str, Whitening],
    ) -> dict[str, list[float]]:
        """Returns by adapter tr(W C W^T G) and the numbers of R and of L, zeros without L; a collective."""
        numbers = torch.zeros(len(self.adapters), _NUMBERS, dtype=torch.float64)
        rows = dict(zip(self._by_name, numbers, strict=True))
        for layer, names in layers.items():
            with gathered({self._by_name[name].linear.weight: None for name in names}):  # q, k and v may be rows of one
                for name in names if layer in moments else ():
                    rows[name][0] = _size(self._by_name[name], moments[layer], gradients.get(name))
                    rows[name][1:4] = torch.tensor(inner[layer].numbers)
                    if name in outer:
                        rows[name][4:] = torch.tensor(outer[name].numbers)
        return dict(zip(self._by_name, sum_over_ranks(numbers).tolist(), strict=True))

    def _outer_matrices(
        self, layers: Mapping[str, Sequence[str]], own: Mapping[str, Whitening], trainer: Trainer
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields by adapter the matrix of L, from the rank that has it in `own`; a collective."""

        def joined(layer: str) -> torch.Tensor:
            return torch.cat([own[name].matrix.flatten() for name in layers[layer]])

        for layer, values in trainer.by_layer(layers, joined).items():
            shapes = [self._outer_shape(self._by_name[name]) for name in layers[layer]]
            parts = values.split([rows * columns for rows, columns in shapes])
            for name, part, shape in zip(layers[layer], parts, shapes, strict=True):
                yield name, part.view(shape)

    def _weights(self) -> list[float]:
        """Returns as how many tasks each past one counts, and at the end the anchor where there is one."""
        return [1.0] * len(self._past) + ([] if self._anchor is None else [self.options.anchor_tasks])

    def _known_moment(self, layer: str) -> Moment:
        """Returns the mean of past tasks' moments, of which the anchor is some."""
        known = [_stored(task, layer) for task in self._past]
        if self._anchor is not None:
            known.append(self._anchor.sketch(layer))
        weights, keep, device = self._weights(), self.options.sketch, self.backbone.device
        if self._by_name[layer].in_features > self.options.sketch_above:
            sketches = [moment if isinstance(moment, Sketch) else Sketch.of(moment, keep) for moment in known]
            return Sketch.mean([sketch.to(device) for sketch in sketches], weights, keep)
        total = torch.zeros((), device=device)
        for weight, moment in zip(weights, known, strict=True):
            moment = moment.to(device)
            total = total + weight / sum(weights) * (moment.whole() if isinstance(moment, Sketch) else moment)
        return total

    def _known_gradient(self, name: str) -> Sketch:
        """Returns the mean of past tasks' moments of gradients, each of a mean eigenvalue of one."""
        known = [_sketch(task, f"{name}.gradient") for task in self._past]
        if self._anchor is not None:
            known.append(self._anchor.gradient(name))
        known = [sketch.to(self.backbone.device).normalised() for sketch in known]
        return Sketch.mean(known, self._weights(), self.options.sketch)

    def end(self, stage: Stage, trainer: Trainer) -> None:
        watcher = self._watcher()
        trainer.scan(watcher, batches=self.options.batches, trained=True)
        self._memory = {}
        for layer, moment in watcher.moments.items():
            self._memory[f"{layer}.moment"] = moment
        sketches = {
            f"{name}.gradient": Sketch.of(moment, self.options.sketch) for name, moment in watcher.gradients.items()
        }
        for key, sketch in (watcher.sketches | sketches).items():
            self._memory |= {f"{key}.factor": sketch.factor, f"{key}.rest": sketch.rest}

    def memory(self) -> dict[str, torch.Tensor]:
        """Returns the moments that the stage left; of the stage alone, so that it can be forgotten."""
        return self._memory

    def plan_boundary(self) -> BoundaryPlan:
        watcher = self._watcher()
        inputs = tuple(self._plan_input(layer, names) for layer, names in watcher.layers.items())
        # in `begin`; of the watcher the tokens' weights, both float64, and the traces of wide inputs, and of gradients
        sums = [8 * _NUMBERS * len(self.adapters), 8 * len(inputs)]
        sums += [4 * sum(read.moments[0].is_sketched for read in inputs)]
        sums += [4 * sum(moment.is_sketched for read in inputs for moment in read.moments[1:])]
        sums = tuple(size for size in sums if size)
        return BoundaryPlan(watcher.needs, self.options.batches, inputs, sums, reads_weights=True)

    def _plan_input(self, layer: str, names: Sequence[str]) -> InputPlan:
        width, directions = self._inner_shape(self._by_name[layer])
        moments, sent, left = [self._plan_moment(width)], [width * directions], {f"{layer}.moment": width**2}
        if width > self.options.sketch_above:
            left = {f"{layer}.factor": width * directions, f"{layer}.rest": 1}
        if self.options.outer_ridge is not None:
            shapes = {name: self._outer_shape(self._by_name[name]) for name in names}
            moments += [self._plan_moment(rows) for rows, _ in shapes.values()]
            sent.append(sum(rows * columns for rows, columns in shapes.values()))
            for name, (rows, columns) in shapes.items():
                left |= {f"{name}.gradient.factor": rows * columns, f"{name}.gradient.rest": 1}
        return InputPlan(layer, tuple(moments), tuple(sent), left)

    def _plan_moment(self, width: int) -> MomentPlan:
        is_sketched = width > self.options.sketch_above
        # as many as of `directions`
        return MomentPlan(width, min(4 * self.options.sketch, width) if is_sketched else width, is_sketched)

    def plan_past(self) -> list[torch.Tensor]:
        known = []
        for names in self._watcher().layers.values():
            R = _without_content(self._inner_shape(self._by_name[names[0]]))
            known.append(R.matrix)
            for name in names:
                adapter = self._by_name[name]
                adapter.whitening = R
                if self.options.outer_ridge is not None:
                    adapter.outer = _without_content(self._outer_shape(adapter))
                    known.append(adapter.outer.matrix)
        return known

    def _watcher(self) -> InputMoments:
        by_sensitivity, with_gradients = self.options.by_sensitivity, self.options.outer_ridge is not None
        sketching = Sketching(self.options.sketch_above, self.options.sketch)
        return InputMoments(self.backbone, self.adapters, by_sensitivity, with_gradients, sketching)


def _without_content(shape: tuple[int, int]) -> Whitening:
    return Whitening(torch.empty(shape, device="meta"), gain=1.0, span=1.0, ridge=1.0)


def _stored(memory: Mapping[str, torch.Tensor], layer: str) -> Moment:
    """Returns what a stage left of the input that a layer reads."""
    found = memory.get(f"{layer}.moment")
    return _sketch(memory, layer) if found is None else found


def _sketch(memory: Mapping[str, torch.Tensor], key: str) -> Sketch:
    return Sketch(memory[f"{key}.factor"], memory[f"{key}.rest"])


@torch.no_grad()
def _size(adapter: MetricLinear, moment: Moment, gradient: Sketch | None) -> float:
    """Returns tr(W C W^T G) of the adapter's rows: the mean squared output of the layer on past inputs, seen by G."""
    W = adapter.linear.weight[adapter.rows].float()
    WC = moment.times(W) if isinstance(moment, Sketch) else W @ moment
    return float((WC * (W if gradient is None else gradient.times(W.T).T)).sum())
