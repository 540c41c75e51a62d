"""The run configuration: one typed tree of values.

The same words stand in YAML, in code, on the command line and in the run folder's config.yaml.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from r1p_dist.ds_config import load_deepspeed_config
from r1p_dist.errors import InputError
from r1p_dist.kinds import kind_names, kind_of
from r1p_dist.places import ModelPlace, Place
from r1p_dist.recipe_files import read_recipe
from r1p_dist.safe_yaml import write_yaml


def _refuse_bool(value: Any) -> Any:
    # pydantic would take `true` for 1: `train.lr: yes` must not train.
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _refuse_repeats(values: list[str]) -> list[str]:
    if len(set(values)) != len(values):
        raise ValueError("names the same entry twice")
    return values


def _writable_path(path: Path) -> Path:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError("must be a name in UTF-8") from None
    return path.expanduser()


def _known_kind(name: str) -> str:
    if name not in kind_names():
        raise ValueError(f"must be one of {', '.join(kind_names())}, got {name!r}")
    return name


_LARGEST = 2**31 - 1
Integer = Annotated[int, BeforeValidator(_refuse_bool)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]
Count = Annotated[Integer, Field(ge=1, le=_LARGEST)]
Steps = Annotated[Integer, Field(ge=0, le=_LARGEST)]
Probability = Annotated[Number, Field(ge=0, lt=1)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
StreamPlace = Annotated[str, Place("stream.yaml")]
FilePlace = Annotated[str, Place()]
# Where something is written: from the working directory, as everywhere.
Folder = Annotated[Path, AfterValidator(_writable_path)]


class Section(BaseModel):
    """A section of a configuration. A field's docstring says what its key means."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class BackboneConfig(Section):
    """Which frozen model.

    `open_clip`: `name` and `pretrained` as in open_clip (`pretrained`: a tag or a local safetensors file). `llava`:
    `name` is a folder or a hub's name of a model of transformers, which has its weights; `feature_cache_gb` is how much
    of host memory each rank may keep an image tower's features in, where the tower does not learn; ranks and runs share
    those in `feature_cache_dir` (null: none), as far as `feature_cache_dir_gb` allows (null: all).
    """

    kind: Annotated[str, AfterValidator(_known_kind)] = "open_clip"
    name: Annotated[str, ModelPlace()] = "tiny"
    pretrained: FilePlace | None = None
    force_quick_gelu: bool = False
    feature_cache_gb: NotNegative = 1.0
    feature_cache_dir: Folder | None = None
    feature_cache_dir_gb: Positive | None = None
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _check_kind(self) -> BackboneConfig:
        for key, remedy in kind_of(self.kind).unknown.items():
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                raise ValueError(f"backbone.{key}={value}: not for backbone.kind={self.kind}; {remedy}")
        return self


class TargetsConfig(Section):
    """Which linears of every block get an adapter; null: all of the backbone's kind, but not a LLaVA's image tower."""

    towers: Annotated[list[str], Field(min_length=1), AfterValidator(_refuse_repeats)] | None = None
    layers: Annotated[list[str], Field(min_length=1), AfterValidator(_refuse_repeats)] | None = None

    def of_kind(self, kind: str) -> TargetsConfig:
        """Return these with the defaults of a kind of backbone filled in. ValueError: a name that it does not have."""
        has = kind_of(kind)
        for key, known in (("towers", has.towers), ("layers", has.layers)):
            for name in getattr(self, key) or ():
                if name not in known:
                    raise ValueError(
                        f"targets.{key}: a backbone of kind {kind} has no {name!r}; it has {', '.join(known)}"
                    )
        return TargetsConfig(
            towers=self.towers or list(has.default_towers),
            layers=self.layers or list(has.layers),
        )


class TaskTrainConfig(Section):
    """What one task trains with instead of the values in `train`."""

    lr: Positive | None = None
    iterations: Count | None = None
    warmup_steps: Steps | None = None
    weight_decay: NotNegative | None = None


class TrainConfig(Section):
    """One task's training; an iteration is one optimizer step on one global batch.

    `average_over`: what the loss of conversations is the mean of: the answer tokens of a global batch, or its samples,
    each the mean of its tokens. `compile`: torch.compile for the blocks, which pays on an accelerator; not with ZeRO-3.
    """

    iterations: Count = 500
    global_batch_size: Count = 32
    gradient_accumulation_steps: Count = 1
    lr: Positive = 2e-3
    min_lr: NotNegative = 1e-6
    warmup_steps: Steps = 0
    weight_decay: NotNegative = 1e-2
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    gradient_clipping: Positive | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    average_over: Literal["tokens", "samples"] = "tokens"
    per_task: dict[str, TaskTrainConfig] = {}

    def for_task(self, name: str) -> TrainConfig:
        """Return the values that the task `name` trains with: these, with its entry in `per_task` laid over."""
        own = self.per_task.get(name, TaskTrainConfig())
        return self.model_copy(update={**own.model_dump(exclude_none=True), "per_task": {}})

    def micro_batch_size(self, ranks: int) -> int:
        """Return the samples of a rank in a micro step. InputError: the global batch does not divide among ranks."""
        micro_batches = ranks * self.gradient_accumulation_steps
        if self.global_batch_size % micro_batches:
            raise InputError(
                f"train.global_batch_size={self.global_batch_size} does not divide into {ranks} ranks times "
                f"train.gradient_accumulation_steps={self.gradient_accumulation_steps}; use a multiple of "
                f"{micro_batches}"
            )
        return self.global_batch_size // micro_batches

    @model_validator(mode="after")
    def _check_schedule(self) -> TrainConfig:
        if self.global_batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} must be a multiple of "
                f"train.gradient_accumulation_steps={self.gradient_accumulation_steps}"
            )
        for prefix, values in [("train", self)] + [
            (f"train.per_task.{name}", self.for_task(name)) for name in self.per_task
        ]:
            if values.min_lr > values.lr:
                raise ValueError(f"train.min_lr={values.min_lr} must not be larger than {prefix}.lr={values.lr}")
            if values.warmup_steps >= values.iterations:
                raise ValueError(
                    f"{prefix}.warmup_steps={values.warmup_steps} must be smaller than "
                    f"{prefix}.iterations={values.iterations}"
                )
        return self


class DataConfig(Section):
    """`shots`: training pictures per class (null: all). Workers are loader processes per rank.

    `samples`: training samples of each task of conversations (null: all). `group_by_length`: how many global batches'
    conversations are sorted by length among themselves, so that a batch has samples of like length (null: none).
    `packing`: the conversations of a micro batch of a rank are one row without padding, and each sees itself alone.
    `shuffle_shards`: how many shards' samples are mixed with one another (null: a whole epoch's, which needs all shards
    at hand). `replay_share`: the share of the training samples that comes from the tasks trained before;
    `reference_share` comes from the tasks of `reference`, a stream like `stream`. `max_bad_fraction`: the share of a
    task's training samples that may be unusable; null: 0.001, or one sample. `blind`: every picture of a conversation
    is black, which shows what the questions alone give away. Copies of remote shards are kept in
    `cache_dir` (null: the user's cache folder), as far as `cache_gb` allows (null: all).
    """

    shots: Count | None = None
    samples: Count | None = None
    group_by_length: Count | None = None
    packing: bool = False
    shuffle_shards: Count | None = None
    replay_share: Probability = 0.0
    reference: StreamPlace | None = None
    reference_share: Probability = 0.0
    max_bad_fraction: Probability | None = None
    evaluate_on: Literal["test", "validation"] = "test"
    workers: Steps = 0
    augment: bool = True
    blind: bool = False
    cache_dir: Folder | None = None
    cache_gb: Positive | None = None

    @model_validator(mode="after")
    def _check_shares(self) -> DataConfig:
        if self.replay_share + self.reference_share >= 1:
            raise ValueError(
                f"data.replay_share={self.replay_share} and data.reference_share={self.reference_share} must leave "
                "some samples to the task: their sum must be below 1"
            )
        if (self.reference is None) != (self.reference_share == 0):
            raise ValueError(
                f"data.reference={self.reference} and data.reference_share={self.reference_share}: set both or none"
            )
        return self


class EvaluationConfig(Section):
    """`batch_size`: pictures per rank in one forward pass."""

    batch_size: Count = 256


class DeepSpeedConfig(Section):
    """A name in ds_configs/ or the path of a JSON file, and keys laid over it."""

    config: FilePlace = "zero2"
    overrides: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_keys(self) -> DeepSpeedConfig:
        load_deepspeed_config(self.config, self.overrides)
        return self


class LogConfig(Section):
    """How often the log gets a line (in steps), and whether TensorBoard files are written too."""

    every_steps: Count = 10
    tensorboard: bool = False


class CheckpointConfig(Section):
    """How often a run is saved, in optimizer steps (null: only after each task), and how many of a task are kept."""

    every_steps: Count | None = 100
    keep: Count = 2


class FaultsConfig(Section):
    """What is done when something goes wrong.

    `not_finite`: a loss that is NaN or infinite stops the run, or its step is skipped. `hang_minutes`: the run ends
    with the stacks of all ranks when nothing has moved for so long (null: never).
    """

    not_finite: Literal["stop", "skip"] = "stop"
    hang_minutes: Positive | None = 30


class RunConfig(Section):
    """Everything that decides a run.

    `method`: a shipped one, one of an installed package, or `package.module:Class`; `options`: its own, which its class
    checks. `resume`: `auto` resumes from the newest whole checkpoint in `run_dir`, `never` starts over, a path names a
    checkpoint. `extend`: tasks behind those of the stream, each `STREAM:TASK`, or `STREAM` for all of its tasks; a run
    that is finished goes on with them.
    """

    run_dir: Folder
    resume: Annotated[str, Place("state.json")] = "auto"
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 0
    method: str = "dac"
    stream: StreamPlace = "mini_mtil"
    order: str | None = None
    tasks: Annotated[list[str], Field(min_length=1), AfterValidator(_refuse_repeats)] | None = None
    extend: list[StreamPlace] = []
    backbone: BackboneConfig = BackboneConfig()
    options: dict[str, Any] = {}
    targets: TargetsConfig = TargetsConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()

    @classmethod
    def load(cls, recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
        """Return the configuration of a recipe (a shipped name or a YAML file) with `key.sub=value` overrides.

        The method's options are taken as they are written, for they are its class's, which needs torch;
        `r1p_dist.load_config` checks them as well. InputError: one line that names file, key, value and remedy.
        """
        return read_recipe(cls, recipe, overrides)[0]

    @model_validator(mode="after")
    def _check_conversations(self) -> RunConfig:
        for key in ("blind", "packing"):
            if getattr(self.data, key) and not kind_of(self.backbone.kind).has_answers:
                able = " or ".join(name for name in kind_names() if kind_of(name).has_answers)
                raise ValueError(f"data.{key}=true needs backbone.kind={able}, got {self.backbone.kind}")
        if self.data.packing and self.train.compile:
            raise ValueError(
                "data.packing=true: train.compile=true would compile again for the lengths of every batch; set one of "
                "both to false"
            )
        return self

    @model_validator(mode="after")
    def _check_targets(self) -> RunConfig:
        targets = self.targets.of_kind(self.backbone.kind)
        object.__setattr__(self, "targets", targets)  # what null stands for depends on another section
        return self

    def dump(self) -> str:
        """Return the resolved configuration as YAML, keys in the order of the fields; `load_config` reads it back.

        Its folders are absolute, so that it says the same from any directory.
        """
        tree = self.model_dump(mode="json") | {"run_dir": str(self.run_dir.absolute())}
        for section, key, folder in (
            ("data", "cache_dir", self.data.cache_dir),
            ("backbone", "feature_cache_dir", self.backbone.feature_cache_dir),
        ):
            if folder is not None:
                tree[section][key] = str(folder.absolute())
        return write_yaml(tree)
