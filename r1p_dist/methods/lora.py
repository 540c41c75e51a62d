"""Plain LoRA on the stream (Hu et al., arXiv 2106.09685): kept going from task to task, or merged and begun anew."""

from r1p_dist.protocol import LowRankMethod, LowRankOptions


class Lora(LowRankMethod):
    """Sequential LoRA: one adapter kept going, or with `restart` merged after each task and begun anew.

    W x + alpha / rank * B A x, A random and B zero at first, W frozen.
    """

    paper = "arXiv 2106.09685"

    class Options(LowRankOptions):
        """Options of sequential LoRA."""

        restart: bool = False
        """Merge after each task and begin a fresh adapter; else one adapter is kept going."""

    tiny = {"rank": 4}
    options: Options

    def prepare(self, index: int) -> None:
        if index == 0 or self.options.restart:
            super().prepare(index)

    def deployed(self, count: int) -> list[int]:
        return super().deployed(count)[0 if self.options.restart else -1 :]

    def merged(self, index: int) -> list[int]:
        return super().merged(index) if self.options.restart else []  # the adapter itself holds what was learnt
