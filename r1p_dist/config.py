"""The run configuration: one typed tree, read from a recipe (YAML) and `key.sub=value` overrides.

The same words stand in YAML, in code, on the command line and in the run folder's config.yaml.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from r1p_dist.ds_config import load_deepspeed_config
from r1p_dist.errors import InputError
from r1p_dist.safe_yaml import parse_yaml
from r1p_dist.shipped import shipped_files

COMMAND_LINE = "command line"


def _refuse_bool(value: Any) -> Any:
    # pydantic would take `true` for 1: `train.lr: yes` must not train.
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _refuse_repeats(values: list[str]) -> list[str]:
    if len(set(values)) != len(values):
        raise ValueError("names the same entry twice")
    return values


Integer = Annotated[int, BeforeValidator(_refuse_bool)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]
Count = Annotated[Integer, Field(ge=1)]
Steps = Annotated[Integer, Field(ge=0)]
Probability = Annotated[Number, Field(ge=0, lt=1)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BackboneConfig(_Section):
    """Which frozen model.

    `open_clip`: `name` and `pretrained` as in open_clip (`pretrained`: a tag or a local safetensors file). `llava`:
    `name` is a folder or a hub's name of a model of transformers, which has its weights; `feature_cache_gb` is how much
    of host memory each rank may keep an image tower's features in, where the tower has no adapters.
    """

    kind: Literal["open_clip", "llava"] = "open_clip"
    name: str = "tiny"
    pretrained: str | None = None
    force_quick_gelu: bool = False
    feature_cache_gb: NotNegative = 1.0
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _check_kind(self) -> BackboneConfig:
        if self.kind == "llava" and (self.pretrained is not None or self.force_quick_gelu):
            raise ValueError(
                f"backbone.pretrained={self.pretrained} and backbone.force_quick_gelu={self.force_quick_gelu} are for "
                "backbone.kind=open_clip; a llava model's name says where its weights are"
            )
        return self


Tower = Literal["image", "text", "language", "projector"]
Layer = Literal["q", "k", "v", "out", "fc1", "fc2", "o", "gate", "up", "down"]
# What there is per kind of backbone, and the towers that get adapters unless others are named.
TOWERS: dict[str, tuple[str, ...]] = {"open_clip": ("image", "text"), "llava": ("language", "projector", "image")}
DEFAULT_TOWERS = {"open_clip": ["image", "text"], "llava": ["language", "projector"]}
LAYERS: dict[str, tuple[str, ...]] = {
    "open_clip": ("q", "k", "v", "out", "fc1", "fc2"),
    "llava": ("q", "k", "v", "o", "gate", "up", "down", "fc1", "fc2"),
}


class TargetsConfig(_Section):
    """Which linears of every block get an adapter; null: all of the backbone's kind, but not a LLaVA's image tower."""

    towers: Annotated[list[Tower], Field(min_length=1), AfterValidator(_refuse_repeats)] | None = None
    layers: Annotated[list[Layer], Field(min_length=1), AfterValidator(_refuse_repeats)] | None = None

    def of_kind(self, kind: str) -> TargetsConfig:
        """Return these with the defaults of a kind of backbone filled in. ValueError: a name that it does not have."""
        for key, known in (("towers", TOWERS[kind]), ("layers", LAYERS[kind])):
            for name in getattr(self, key) or ():
                if name not in known:
                    raise ValueError(
                        f"targets.{key}: a backbone of kind {kind} has no {name!r}; it has {', '.join(known)}"
                    )
        return TargetsConfig(
            towers=self.towers or DEFAULT_TOWERS[kind],
            layers=self.layers or list(LAYERS[kind]),
        )


class GuideConfig(_Section):
    """Which vector of a layer's input the router reads, per tower; `cls_image`: the image tower's [CLS] for all."""

    image: Literal["first", "mean"] = "first"
    text: Literal["first", "eot", "mean"] = "first"
    language: Literal["cls_image", "first", "mean", "last_prompt"] = "cls_image"
    projector: Literal["cls_image", "first", "mean"] = "cls_image"


class PoolConfig(_Section):
    """The pool of rank-1 experts of one adapted linear; scaling is alpha / rank."""

    rank: Count = 12
    alpha: Positive = 1.0
    active: Count = 8
    merged: Count = 4
    dropout: Probability = 0.0
    dropout_kind: Literal["element", "feature"] = "element"
    guide: GuideConfig = GuideConfig()
    router_grad: Literal["none", "straight_through", "gated"] = "none"
    vote: Literal["global", "lagged", "local"] = "global"

    @model_validator(mode="after")
    def _check_sizes(self) -> PoolConfig:
        if self.active > self.rank:
            raise ValueError(f"pool.active={self.active} must not be larger than pool.rank={self.rank}")
        if self.merged > self.active:
            raise ValueError(f"pool.merged={self.merged} must not be larger than pool.active={self.active}")
        return self


class AgoConfig(_Section):
    """The activation-guided orthogonal loss: its weight (the paper's lambda) and how pairs are reduced."""

    weight: NotNegative = 0.1
    reduction: Literal["sum_top", "paper_mean", "code_all"] = "sum_top"


class LoraConfig(_Section):
    """Sequential LoRA; `restart` merges after each task and begins anew, else one adapter is kept going."""

    rank: Count = 12
    alpha: Positive = 1.0
    dropout: Probability = 0.0
    restart: bool = False


class TaskTrainConfig(_Section):
    """What one task trains with instead of the values in `train`."""

    lr: Positive | None = None
    iterations: Count | None = None
    warmup_steps: Steps | None = None
    weight_decay: NotNegative | None = None


class TrainConfig(_Section):
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


class DataConfig(_Section):
    """`shots`: training pictures per class (null: all). Workers are loader processes per rank.

    `samples`: training samples of each task of conversations (null: all). `group_by_length`: how many global batches'
    conversations are sorted by length among themselves, so that a batch has samples of like length (null: none).
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
    shuffle_shards: Count | None = None
    replay_share: Probability = 0.0
    reference: str | None = None
    reference_share: Probability = 0.0
    max_bad_fraction: Probability | None = None
    evaluate_on: Literal["test", "validation"] = "test"
    workers: Steps = 0
    augment: bool = True
    blind: bool = False
    cache_dir: Path | None = None
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


class EvaluationConfig(_Section):
    """`batch_size`: pictures per rank in one forward pass."""

    batch_size: Count = 256


class DeepSpeedConfig(_Section):
    """A name in ds_configs/ or the path of a JSON file, and keys laid over it."""

    config: str = "zero2"
    overrides: dict[str, Any] = {}


class LogConfig(_Section):
    """How often the log gets a line (in steps), and whether TensorBoard files are written too."""

    every_steps: Count = 10
    tensorboard: bool = False


class CheckpointConfig(_Section):
    """How often a run is saved, in optimizer steps (null: only after each task), and how many of a task are kept."""

    every_steps: Count | None = 100
    keep: Count = 2


class FaultsConfig(_Section):
    """What is done when something goes wrong.

    `not_finite`: a loss that is NaN or infinite stops the run, or its step is skipped. `hang_minutes`: the run ends
    with the stacks of all ranks when nothing has moved for so long (null: never).
    """

    not_finite: Literal["stop", "skip"] = "stop"
    hang_minutes: Positive | None = 30


class RunConfig(_Section):
    """Everything that decides a run.

    `resume`: `auto` goes on from the newest whole checkpoint in `run_dir`, `never` begins anew, a path names a
    checkpoint. `extend`: tasks behind those of the stream, each `STREAM:TASK`, or `STREAM` for all of its tasks; a run
    that is finished goes on with them.
    """

    run_dir: Path | None = None
    resume: str = "auto"
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 0
    method: str = "dac"
    stream: str = "mini_mtil"
    order: str | None = None
    tasks: Annotated[list[str], Field(min_length=1), AfterValidator(_refuse_repeats)] | None = None
    extend: list[str] = []
    backbone: BackboneConfig = BackboneConfig()
    targets: TargetsConfig = TargetsConfig()
    pool: PoolConfig = PoolConfig()
    ago: AgoConfig = AgoConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()

    @model_validator(mode="after")
    def _check_blindness(self) -> RunConfig:
        if self.data.blind and self.backbone.kind != "llava":
            raise ValueError(f"data.blind=true needs backbone.kind=llava, got {self.backbone.kind}")
        return self

    @model_validator(mode="after")
    def _check_targets(self) -> RunConfig:
        targets = self.targets.of_kind(self.backbone.kind)
        if self.backbone.kind == "llava" and self.pool.router_grad != "none" and targets.towers != ["language"]:
            raise ValueError(
                f"pool.router_grad={self.pool.router_grad}: only for the language model of a llava backbone, because "
                "ranks have unlike numbers of pictures; set targets.towers=[language]"
            )
        object.__setattr__(self, "targets", targets)  # what null stands for depends on another section
        return self

    @classmethod
    def load(cls, recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
        """Return the configuration of a recipe (a shipped name or a YAML file) with `key.sub=value` overrides.

        Raises InputError, one line that names file, key and value, for anything that is wrong in them.
        """
        path = _find_recipe(recipe)
        tree, origins = _read_with_bases(path, ())
        for override in overrides:
            _lay_over(tree, _parse_override(override), origins, COMMAND_LINE)
        tree.setdefault("run_dir", None)
        if tree["run_dir"] is None:
            tree["run_dir"] = str(Path("runs") / path.stem)
        try:
            config = cls.model_validate(tree)
        except ValidationError as error:
            raise InputError(_describe(error, origins, str(path))) from error
        # Read here as well, so that --print-config and every rank find a wrong DeepSpeed key before any work.
        load_deepspeed_config(config.deepspeed.config, config.deepspeed.overrides)
        return config

    def dump(self) -> str:
        """Return the resolved configuration as YAML, keys in the order of the fields; `load` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _find_recipe(recipe: str | Path, beside: Path | None = None) -> Path:
    shipped = shipped_files("recipes", ".yaml")
    if isinstance(recipe, str) and recipe in shipped:
        return shipped[recipe]
    path = Path(recipe) if beside is None else beside / recipe
    if path.is_file():
        return path
    nearest = difflib.get_close_matches(str(recipe), shipped, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise InputError(f"recipe {str(recipe)!r}: no file and no shipped recipe; {hint}shipped: {', '.join(shipped)}")


_Origins = dict[tuple[str, ...], str]


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], _Origins]:
    if path.resolve() in seen:
        chain = " -> ".join(entry.name for entry in (*seen, path))
        raise InputError(f"{path}: base: the recipes form a circle: {chain}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    recipe = parse_yaml(text, str(path))
    if recipe is None:
        recipe = {}
    if not isinstance(recipe, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values, this file holds a {type(recipe).__name__}")
    tree: dict[str, Any] = {}
    origins: _Origins = {}
    if "base" in recipe:
        base = recipe.pop("base")
        if not isinstance(base, str):
            raise InputError(f"{path}: base: {base!r}: must be the name or path of a recipe")
        try:
            base_path = _find_recipe(base, beside=path.parent)
        except InputError as error:
            raise InputError(f"{path}: base: {error}") from error
        tree, origins = _read_with_bases(base_path, (*seen, path.resolve()))
    _lay_over(tree, recipe, origins, str(path))
    return tree, origins


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise InputError(f"{COMMAND_LINE}: {override!r} is not an override; write key.sub=value, as in train.lr=1e-3")
    value = parse_yaml(text, f"{COMMAND_LINE}: {key}")
    for part in reversed(parts):
        value = {part: value}
    return value


def _lay_over(tree: dict[str, Any], over: dict[Any, Any], origins: _Origins, source: str) -> None:
    """Merge `over` into `tree` and note in `origins` where each value came from; unknown keys raise InputError."""
    _refuse_unknown_keys(RunConfig, over, (), source)
    _merge(tree, over, (), origins, source)


def _merge(tree: dict[str, Any], over: dict[Any, Any], at: tuple[str, ...], origins: _Origins, source: str) -> None:
    for key, value in over.items():
        here = (*at, str(key))
        if isinstance(value, dict):
            if not isinstance(tree.get(str(key)), dict):
                tree[str(key)] = {}
            _merge(tree[str(key)], value, here, origins, source)
        else:
            tree[str(key)] = value
            for below in [entry for entry in origins if entry[: len(here)] == here]:
                del origins[below]
            origins[here] = source


def _refuse_unknown_keys(model: type[BaseModel], section: Any, at: tuple[str, ...], source: str) -> None:
    if not isinstance(section, dict):
        return  # not a section at all: the validation says so, with its type
    for key, value in section.items():
        here = (*at, str(key))
        if key not in model.model_fields:
            allowed = list(model.model_fields)
            hint = _nearest_key(here, allowed)
            raise InputError(f"{source}: unknown key {'.'.join(here)}; {hint}allowed: {', '.join(allowed)}")
        inner = _model_of(model.model_fields[key].annotation)
        if inner is TaskTrainConfig and isinstance(value, dict):
            for task, entry in value.items():
                _refuse_unknown_keys(inner, entry, (*here, str(task)), source)
        elif inner is not None:
            _refuse_unknown_keys(inner, value, here, source)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *get_args(annotation)]
    return next((entry for entry in candidates if isinstance(entry, type) and issubclass(entry, BaseModel)), None)


def _nearest_key(key: tuple[str, ...], allowed: list[str]) -> str:
    every = list(_all_keys(RunConfig, ()))
    same_name = [dotted for dotted in every if dotted.split(".")[-1] == key[-1]]
    if same_name:
        return f"did you mean {' or '.join(same_name)}? "
    nearest = difflib.get_close_matches(key[-1], allowed, n=1)
    if nearest:
        return f"did you mean {'.'.join((*key[:-1], nearest[0]))}? "
    anywhere = difflib.get_close_matches(".".join(key), every, n=1)
    return f"did you mean {anywhere[0]}? " if anywhere else ""


def _all_keys(model: type[BaseModel], at: tuple[str, ...]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield ".".join((*at, name))
        inner = _model_of(field.annotation)
        if inner is not None and inner is not TaskTrainConfig:
            yield from _all_keys(inner, (*at, name))


def _describe(error: ValidationError, origins: _Origins, recipe: str) -> str:
    return "; ".join(_describe_one(entry, origins, recipe) for entry in error.errors(include_url=False))


def _describe_one(entry: Any, origins: _Origins, recipe: str) -> str:
    at = tuple(str(part) for part in entry["loc"])
    if entry["type"] == "value_error":
        reason = str(entry["ctx"]["error"])
    elif entry["type"] in ("model_type", "dict_type"):
        reason = "must be a mapping of keys to values"
    else:
        reason = entry["msg"]
    where = _sources(at, origins, recipe)
    if isinstance(entry["input"], dict) and entry["type"] == "value_error":
        return f"{where}: {reason}"  # a check over several keys names them and their values itself
    value = repr(entry["input"])
    shown = value if len(value) <= 80 else value[:77] + "..."
    return f"{where}: {'.'.join(at)}={shown}: {reason[0].lower()}{reason[1:]}"


def _sources(at: tuple[str, ...], origins: _Origins, recipe: str) -> str:
    below = [source for key, source in origins.items() if key[: len(at)] == at]
    if below:
        return " and ".join(dict.fromkeys(below))
    return next((origins[at[:length]] for length in range(len(at), 0, -1) if at[:length] in origins), recipe)
