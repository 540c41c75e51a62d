"""The engine of a stage leaves the model as it found it."""

from collections.abc import Iterator

import pytest
import torch

from r1p_dist.distributed import end_process_group
from r1p_dist.engine import TaskEngine, start_process_group
from r1p_dist.methods import make_method
from r1p_dist.recipes import load_config
from tests.small_clip import make_backbone
from tests.test_parity import PROMPTS, global_batch

TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


@pytest.fixture
def process_group() -> Iterator[None]:
    start_process_group()
    yield
    end_process_group()


@pytest.mark.parametrize("stage", [0, 3])
def test_hooks_that_others_put_on_modules_stay_and_deepspeeds_go(process_group: None, stage: int) -> None:
    config = load_config("mini_mtil_dac", [f"deepspeed.config=zero{stage}", "train.global_batch_size=4"])
    backbone = make_backbone()
    method = make_method(config, backbone)
    module = method.adapters[0].linear
    seen = []
    module.register_forward_hook(lambda *_: seen.append("before the engine"))
    engine = TaskEngine(backbone, config, config.train, 1)
    module.register_forward_hook(lambda *_: seen.append("in its life"))
    batch = backbone.preparer(PROMPTS)(global_batch(0, 0, 4))
    backbone.train()
    engine.step(method.loss(engine, batch)[0])
    engine.close()
    assert sum(len(getattr(each, table)) for each in backbone.modules() for table in TABLES) == 2
    seen.clear()
    if stage == 0:  # what ZeRO-3 sharded stays sharded, and no engine is there to gather it
        module(torch.zeros(1, module.in_features))
        assert seen == ["before the engine", "in its life"]
