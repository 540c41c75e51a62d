"""WiSE-FT (arXiv 2109.01903): weights between those that a task began with and those that it was fine-tuned to."""

from r1p_dist.config import Section, Share
from r1p_dist.protocol import FullMethod, Stage, Trainer


class WiseFt(FullMethod):
    """WiSE-FT: full fine-tuning, after each task drawn back towards the weights it began with (arXiv 2109.01903).

    theta = share * tuned + (1 - share) * start, elementwise. The paper fine-tunes once, from the pretrained model, and
    names 0.5 where nothing is known; on a stream the start of each task is the model after the one before, as in the
    code released with ZSCL (arXiv 2303.06628), which has 0.8.
    """

    paper = "arXiv 2109.01903"
    stores = "in training, the weights that the task began with"
    columns = ("start",)
    tiny = {"share": 0.7}

    class Options(Section):
        """Options of WiSE-FT."""

        share: Share = 0.5
        """Of the tuned weights in the mean; the paper's alpha, ZSCL's code has 0.8."""

    options: Options

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        trainer.edit_column("start", lambda start, value: value)

    def end(self, stage: Stage, trainer: Trainer) -> None:
        trainer.edit(lambda value, start: start.lerp(value, self.options.share), "start")
