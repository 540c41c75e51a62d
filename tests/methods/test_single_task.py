"""Methods whose papers train one task: each task of a stream anew, or all of them as that one."""

from types import SimpleNamespace

import pytest

from r1p_dist.methods import make_method
from r1p_dist.recipes import load_config
from tests.methods.test_conformance import options_of
from tests.small_clip import make_backbone

TASKS = tuple(SimpleNamespace(name=name) for name in ("flags", "cards"))


@pytest.mark.parametrize("name", ["block_lora", "so_ra", "xgb_lora"])
def test_together_all_tasks_are_one_of_as_many_iterations(name: str) -> None:
    def stages(*overrides: str) -> list[tuple[str, tuple, int]]:
        own = ["train.iterations=3", "train.per_task.cards.iterations=4", *options_of(name), *overrides]
        method = make_method(load_config("mini_mtil_dac", own), make_backbone())
        return [(stage.name, stage.tasks, stage.iterations) for stage in method.stages(SimpleNamespace(tasks=TASKS))]

    assert stages() == [("flags", TASKS[:1], 3), ("cards", TASKS[1:], 4)]
    assert stages("options.together=true") == [("together", TASKS, 7)]
