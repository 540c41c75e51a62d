"""CoDyRA (arXiv 2412.01004): a gated LoRA per task, dense for half of it and then thresholded more and more."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from r1p_dist.adapters import GatedLinear, shrink
from r1p_dist.config import Count, NotNegative, Probability, Section
from r1p_dist.protocol import LowRankMethod, Stage, Trainer

if TYPE_CHECKING:
    from r1p_dist.backbones import Slot


class Codyra(LowRankMethod):
    """CoDyRA: ranks whose gates survive growing thresholds are merged after each task (arXiv 2412.01004).

    The update is B diag(gate) A, and after each step gate <- sign(gate) max(|gate| - threshold, 0). Thresholds as in
    the released code, which has 250 dense steps and then 50 levels of 5 steps: the same shares of any number of steps.

    The loss is the contrastive one of all methods here, not the code's, which contrasts pictures with all classes seen.
    That code trains with lr 5e-4, betas (0.9, 0.9999) and no weight decay: set them in `train`.
    """

    paper = "arXiv 2412.01004"
    tiny = {"rank": 4, "threshold": 0.3}
    adapters: list[GatedLinear]

    class Options(Section):
        """Options of CoDyRA; the update has no alpha."""

        rank: Count = 16
        """Rank of the update of each linear before gates close."""
        dense_share: Probability = 0.5
        """Share of a task's steps before the first threshold."""
        threshold: NotNegative = 0.005
        """The last level; the first is 0. Not times the learning rate."""
        levels: Count = 50
        """Levels, each for as many steps."""
        shrink: Literal["soft", "code"] = "soft"
        """By the soft threshold, or as the released code, which zeroes what is below twice the threshold too."""

    options: Options

    def make_adapter(self, slot: Slot) -> GatedLinear:
        return GatedLinear(slot.linear, self.options.rank, alpha=self.options.rank, rows=slot.rows)

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        self._iterations = stage.iterations
        self._gates = {f"{adapter.name}.gate" for adapter in self.adapters}

    def threshold(self, step: int) -> float:
        """Returns the threshold after step `step` (from 0)."""
        options, dense = self.options, self.options.dense_share * self._iterations
        if step < dense or options.levels == 1:
            return 0.0 if step < dense else options.threshold
        level = int((step - dense) * options.levels / (self._iterations - dense))
        return options.threshold * level / (options.levels - 1)

    def after_step(self, trainer: Trainer) -> None:
        threshold = self.threshold(trainer.step_number)
        if threshold:
            is_code = self.options.shrink == "code"
            trainer.edit(partial(shrink, threshold=threshold, is_doubled=is_code), only=self._gates)
