"""What predicts: the folder of a run or of an exported model, as far as it is known without torch."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from r1p_dist.config import BackboneConfig, DataConfig, EvaluationConfig, RunConfig
from r1p_dist.data.stream import Task
from r1p_dist.data.task_list import read_tasks, tasks_of_run
from r1p_dist.errors import InputError
from r1p_dist.kinds import Kind, kind_names, kind_of
from r1p_dist.run_files import CONFIG_FILE, TASKS_FILE


@dataclass(frozen=True)
class Source:
    """The folder that predicts. run: its configuration; None for a model alone, which has no model before it."""

    folder: Path
    backbone: BackboneConfig
    run: RunConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    precision: str = "auto"

    @property
    def kind(self) -> Kind:
        return kind_of(self.backbone.kind)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, without shards. InputError: the folder does not say which."""
        if self.run is not None:
            return tasks_of_run(self.folder, self.run)
        if not (self.folder / TASKS_FILE).is_file():
            remedy = "export its run again" if self.kind.has_answers else "name classes: --classes a,b,c"
            raise InputError(f"{self.folder}: has no {TASKS_FILE}, so its tasks are not known; {remedy}")
        return read_tasks(self.folder / TASKS_FILE)


def open_source(folder: Path) -> Source:
    """Returns what a folder holds. InputError: neither a run nor a model that can be loaded again."""
    if (folder / CONFIG_FILE).is_file():
        run = RunConfig.load(folder / CONFIG_FILE)
        return Source(folder, run.backbone, run, run.data, run.evaluation, run.train.precision)
    for kind in kind_names():
        name = kind_of(kind).part("files").model_in(folder)
        if name is not None:
            return Source(folder, BackboneConfig(kind=kind, name=name))
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give that of a run or of an export")
    raise InputError(
        f"{folder}: neither the folder of a run, with a {CONFIG_FILE}, nor an export that can be loaded here again: "
        "`r1p export --to open_clip` of a CLIP, `--to hf` of a vision-language model; give the run's folder"
    )
