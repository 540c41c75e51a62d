"""Joint training: one stage of all tasks, with as many iterations as they have one after the other, of a plain LoRA."""

from types import SimpleNamespace

import torch

TASKS = tuple(SimpleNamespace(name=name) for name in ("flags", "cards", "shapes"))


def test_all_tasks_are_one_stage_with_the_iterations_of_all(stages_of) -> None:
    own = ["train.iterations=3", "train.per_task.cards.iterations=5"]
    method, alone = (stages_of(name, *own)[0].method for name in ("joint", "lora"))
    stream = SimpleNamespace(tasks=TASKS)
    (stage,) = method.stages(stream)
    assert stage.tasks == TASKS and stage.iterations == 3 + 5 + 3
    assert stage.iterations == sum(stage.iterations for stage in alone.stages(stream))
    assert method.deployed(1) == [0] and method.further_data(stage, ()) == {}


def test_it_trains_what_a_lora_does(stages_of) -> None:
    left = []
    for name in ("joint", "lora"):
        stages, train = stages_of(name)
        stages.begin(0)
        train(0)
        stages.end()
        stages.engine.close()
        left.append(torch.cat([(update.B @ update.A).flatten() for update in stages.updates[0].values()]))
    assert left[0].any() and torch.equal(*left)
