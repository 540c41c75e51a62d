"""What a stage reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from r1p_dist.config import RunConfig
from r1p_dist.data import Encoder, Task, TrainLoader, train_loader
from r1p_dist.protocol import Method, Stage


@dataclass(frozen=True)
class StageData:
    """train: the stage's batches. further: those that its method asks for beside. scan: makes a loader of so many
    global batches of the stage's own samples, None: as many as an epoch has."""

    train: TrainLoader
    further: Mapping[str, TrainLoader]
    scan: Callable[[int | None], TrainLoader]


def stage_data(
    config: RunConfig,
    method: Method,
    stages: Sequence[Stage],
    index: int,
    encoder: Encoder,
    reference: Sequence[Task] = (),
) -> StageData:
    """Returns the data of stage `index`. reference: tasks of the stream `data.reference`."""
    stage, past = stages[index], [task for before in stages[:index] for task in before.tasks]
    further = {
        name: train_loader(config, request.tasks, stage.iterations, encoder, kept=request.kept)
        for name, request in method.further_data(stage, past).items()
    }
    train = train_loader(config, stage.tasks, stage.iterations, encoder, past=past, reference=reference)
    return StageData(train, further, partial(train_loader, config, stage.tasks, encoder=encoder))
