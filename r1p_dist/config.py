"""The run configuration: one typed tree of values.

The same words stand in YAML, in code, on the command line and in the run folder's config.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
Share = Annotated[Number, Field(gt=0, le=1)]
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
    """Which frozen model."""

    kind: Annotated[str, AfterValidator(_known_kind)] = "open_clip"
    """`open_clip`: a CLIP of open_clip; `llava`: a model of transformers that answers questions about pictures."""
    name: Annotated[str, ModelPlace()] = "tiny"
    """A model of open_clip; or the folder or hub's name of a model of transformers, which has its weights."""
    pretrained: FilePlace | None = None
    """Weights of an open_clip model: a tag, or a local safetensors file."""
    force_quick_gelu: bool = False
    """As open_clip's option: for weights that were trained with that activation under a name without it."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """As transformers' option, for all towers of its models; null: its own choice, SDPA where a model can."""
    feature_cache_gb: NotNegative = 1.0
    """Host memory in which each rank keeps an image tower's features, where the tower does not learn."""
    feature_cache_dir: Folder | None = None
    """A folder in which ranks and runs share such features; null: none."""
    feature_cache_dir_gb: Positive | None = None
    """How much they may take there; null: as much as there is."""
    gradient_checkpointing: bool = False
    """Run every block again in the backward instead of keeping its activations."""

    @model_validator(mode="after")
    def _check_kind(self) -> BackboneConfig:
        for key, remedy in kind_of(self.kind).unknown.items():
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                raise ValueError(f"backbone.{key}={value}: not for backbone.kind={self.kind}; {remedy}")
        return self


class TargetsConfig(Section):
    """Which linears of every block get an adapter."""

    towers: Annotated[list[str], Field(min_length=1), AfterValidator(_refuse_repeats)] | None = None
    """Of `image`, `text`, or a LLaVA's `image`, `projector`, `language`; null: all, but not a LLaVA's image tower."""
    layers: Annotated[list[str], Field(min_length=1), AfterValidator(_refuse_repeats)] | None = None
    """Of `q`, `k`, `v`, `out`, `fc1`, `fc2` and what else the kind has; null: all."""

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
    """What one task trains with instead of the values in `train`; null: as there."""

    lr: Positive | None = None
    """The highest learning rate."""
    iterations: Count | None = None
    """Optimizer steps."""
    warmup_steps: Steps | None = None
    """Steps in which the learning rate rises."""
    weight_decay: NotNegative | None = None
    """AdamW's."""


class TrainConfig(Section):
    """One task's training by AdamW."""

    iterations: Count = 500
    """Optimizer steps of a task, each on one global batch."""
    global_batch_size: Count = 32
    """Samples of all ranks in one step."""
    gradient_accumulation_steps: Count = 1
    """Micro batches that a rank's part of a global batch is made of."""
    lr: Positive = 2e-3
    """The highest learning rate; it falls along a cosine."""
    min_lr: NotNegative = 1e-6
    """The learning rate at the end of a task."""
    warmup_steps: Steps = 0
    """Steps in which the learning rate rises from 0, at the beginning of a task."""
    weight_decay: NotNegative = 1e-2
    """AdamW's."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """AdamW's."""
    gradient_clipping: Positive | None = None
    """The largest norm of all gradients together; null: any."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of frozen weights and activations; `auto`: bf16 on an accelerator, else fp32. What is trained is kept in fp32."""
    compile: bool = False
    """torch.compile for the blocks, which pays on an accelerator; not with ZeRO-3."""
    average_over: Literal["tokens", "samples"] = "tokens"
    """What the loss of conversations is the mean of: a global batch's answer tokens, or its samples, each the mean of
    its tokens."""
    per_task: dict[str, TaskTrainConfig] = {}
    """Task -> what it trains with instead."""

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
    """What is read, and how."""

    shots: Count | None = None
    """Training pictures per class; null: all."""
    samples: Count | None = None
    """Training samples of each task of conversations; null: all."""
    group_by_length: Count | None = None
    """How many global batches' conversations are sorted by length among themselves, so that a batch has samples of
    like length; null: none."""
    packing: bool = False
    """The conversations of a rank's micro batch are one row without padding, and each sees itself alone."""
    shuffle_shards: Count | None = None
    """How many shards' samples are mixed with one another; null: a whole epoch's, which needs all shards at hand."""
    replay_share: Probability = 0.0
    """Share of the training samples that comes from the tasks trained before."""
    reference: StreamPlace | None = None
    """A stream, like `stream`, that `reference_share` is taken from."""
    reference_share: Probability = 0.0
    """Share of the training samples that comes from the tasks of `reference`."""
    max_bad_fraction: Probability | None = None
    """Share of a task's training samples that may be unusable before the run ends; null: 0.001, or one sample."""
    evaluate_on: Literal["test", "validation"] = "test"
    """The split that every row of the accuracy matrix is of; with `test`, tasks train on their validation split too."""
    workers: Steps = 0
    """Loader processes of each rank; 0: the rank reads itself."""
    augment: bool = True
    """Training pictures are cropped at random, to 0.9 to 1 of their area."""
    blind: bool = False
    """Every picture of a conversation is black, which shows what the questions alone give away."""
    cache_dir: Folder | None = None
    """Where copies of remote shards are kept; null: the user's cache folder."""
    cache_gb: Positive | None = None
    """How much they may take; null: as much as there is."""

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
    """How models are evaluated."""

    batch_size: Count = 256
    """Pictures of a rank in one forward."""


class DeepSpeedConfig(Section):
    """What DeepSpeed is told; keys that the trainer sets itself are refused."""

    config: FilePlace = "zero2"
    """A name in ds_configs/ (`zero0` to `zero3` and more), or a JSON file."""
    overrides: dict[str, Any] = {}
    """DeepSpeed's own keys, laid over it."""

    @model_validator(mode="after")
    def _check_keys(self) -> DeepSpeedConfig:
        load_deepspeed_config(self.config, self.overrides)
        return self


class LogConfig(Section):
    """What is written while a run goes on."""

    every_steps: Count = 10
    """Steps from one line of log.jsonl to the next."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Services that show the run beside its folder."""


class CheckpointConfig(Section):
    """What a run resumes from."""

    every_steps: Count | None = 100
    """Steps from one save to the next; null: after each task alone, which is saved always."""
    keep: Count = 2
    """How many of the running task are kept."""


class FaultsConfig(Section):
    """What is done when something goes wrong."""

    not_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is NaN or infinite stops the run, or its step is skipped."""
    hang_minutes: Positive | None = 30
    """The run ends with the stacks of all ranks when nothing has moved for so long; null: never."""


class RunConfig(Section):
    """Everything that decides a run."""

    run_dir: Folder
    """The run's folder; a recipe that names none gets runs/RECIPE."""
    resume: Annotated[str, Place("state.json")] = "auto"
    """`auto` resumes from the newest whole checkpoint in `run_dir`, `never` starts over, a path names a checkpoint."""
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 0
    """Of everything that is drawn: first values, order of samples, augmentation."""
    method: str = "dac"
    """A shipped one, one of an installed package, or `package.module:Class`; `r1p methods` lists them."""
    stream: StreamPlace = "mini_mtil"
    """A shipped stream, or a stream.yaml."""
    order: str | None = None
    """The name of an order of tasks in the stream's file; null: as they stand there."""
    tasks: Annotated[list[str], Field(min_length=1), AfterValidator(_refuse_repeats)] | None = None
    """The tasks to train, in this order; null: all."""
    extend: list[StreamPlace] = []
    """Tasks behind those of the stream, each `STREAM:TASK`, or `STREAM` for all of its tasks; a finished run goes on
    with them."""
    backbone: BackboneConfig = BackboneConfig()
    options: dict[str, Any] = {}
    """The method's own options, which its class checks; `r1p methods` lists them."""
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

    def flat(self) -> dict[str, Any]:
        """Return every value, plain, by its dotted key; an empty section is a value."""
        return dict(_flat(self.model_dump(mode="json"), ""))


def _flat(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
