"""A method on a small CLIP in this process, for tests of its formulae."""

from collections.abc import Callable, Iterator

import pytest

from r1p_dist.distributed import end_process_group
from r1p_dist.engine import start_process_group
from r1p_dist.fit import train_step
from r1p_dist.methods import make_method
from r1p_dist.recipes import load_config
from tests.methods.test_conformance import Loader, options_of
from tests.small_clip import make_backbone
from tests.stages import Stages
from tests.test_parity import PROMPTS


@pytest.fixture
def stages_of() -> Iterator[Callable]:
    """stages_of(name, *overrides) -> its Stages at ZeRO 0, and train(task) -> the means of the loss and its terms.

    Its `scan_batches(task, count)` are the batches that a scan shows.
    """
    start_process_group()

    def make(name: str, *overrides: str) -> tuple[Stages, Callable[[int], dict[str, float]]]:
        own = ["train.global_batch_size=8", "train.iterations=2", "train.lr=1e-2", "deepspeed.config=zero0"]
        config = load_config("mini_mtil_dac", [*own, *options_of(name), *overrides])
        backbone = make_backbone()
        method = make_method(config, backbone)
        prepare = backbone.preparer(PROMPTS)
        stages = Stages(method, config)
        stages.scan_loader = lambda batches: Loader(stages.index, batches or 2, 1)
        stages.scan_batches = lambda task, count: [prepare(step[0]) for step in Loader(task, count, 1).steps()]

        def train(task: int) -> dict[str, float]:
            for batches in Loader(task, 2, 1).steps():
                train_step(method, stages.trainer, [prepare(batch) for batch in batches], config.train)
            return stages.meter.read(0)[0]

        return stages, train

    yield make
    end_process_group()
