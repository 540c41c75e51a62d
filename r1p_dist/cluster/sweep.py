"""Sweeps: from `key=a,b,c` to the points that are trained, each with its own folder.

    options.rank=8,12,16      alternatives; a value that is a list is written [a, b]
    train.lr=loguniform(1e-4, 1e-2)   a range, as are uniform(a, b) and integer(a, b); for random sweeps

Points are evaluated on the validation split, for the best of them is chosen by it; `data.evaluate_on=test` among the
overrides chooses on the test split, and every table says so.

A grid has every combination. A random sweep (`samples`) draws so many points from alternatives and ranges with its own
seed. The same can stand in a YAML file:

    recipe: mini_mtil
    samples: 20
    seed: 0
    overrides: ["train.iterations=50"]
    parameters:
      options.rank: [8, 12, 16]
      train.lr: loguniform(1e-4, 1e-2)
"""

import itertools
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from r1p_dist.checkpoint.checkpoints import config_differences
from r1p_dist.checks import check_run
from r1p_dist.config import RunConfig
from r1p_dist.data.order import digest_number
from r1p_dist.errors import InputError
from r1p_dist.methods import method_class
from r1p_dist.recipes import load_config
from r1p_dist.run_files import CONFIG_FILE
from r1p_dist.safe_yaml import read_yaml

_RANGE = re.compile(r"(uniform|loguniform|integer)\(([^,()]+),([^,()]+)\)")
_LONGEST_NAME = 120
CHOICE = "data.evaluate_on=validation"  # unless the sweep says otherwise


@dataclass(frozen=True)
class Range:
    """Where a random sweep draws a number from: low to high, both included for integers."""

    kind: str
    low: float
    high: float

    def draw(self, generator: random.Random) -> str:
        if self.kind == "integer":
            return self.as_text(generator.randint(int(self.low), int(self.high)))
        if self.kind == "loguniform":
            return self.as_text(math.exp(generator.uniform(math.log(self.low), math.log(self.high))))
        return self.as_text(generator.uniform(self.low, self.high))

    def as_text(self, value: float) -> str:
        """Returns a number as it stands in a point's folder and overrides."""
        return str(value) if self.kind == "integer" else f"{value:.4g}"


class SweepFile(BaseModel):
    """A sweep in a YAML file; see the head of this module."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str
    parameters: dict[str, Any]
    overrides: list[str] = []
    samples: Annotated[int, Field(strict=True, ge=1)] | None = None
    seed: Annotated[int, Field(strict=True, ge=0)] = 0

    @classmethod
    def load(cls, path: Path) -> "SweepFile":
        """InputError: the file cannot be read, or a key in it is wrong."""
        try:
            return cls.model_validate(read_yaml(path))
        except ValidationError as error:
            fault = error.errors()[0]
            key = ".".join(map(str, fault["loc"])) or "the file"
            raise InputError(f"{path}: {key}: {fault['msg']}; keys: {', '.join(cls.model_fields)}") from error


@dataclass(frozen=True)
class Sweep:
    """What is varied, over which recipe and fixed overrides. parameters: key -> alternatives as text, or a Range."""

    recipe: str
    parameters: dict[str, list[str] | Range]
    overrides: tuple[str, ...] = ()
    samples: int | None = None
    seed: int = 0

    @classmethod
    def parse(cls, recipe: str, words: Sequence[str], samples: int | None = None, seed: int = 0) -> "Sweep":
        """Reads `key=value` words: those with alternatives or a range are varied, the others are fixed overrides."""
        parameters: dict[str, list[str] | Range] = {}
        overrides = []
        for word in words:
            key, separator, text = word.partition("=")
            values = _parse_range(key, text) or split_alternatives(text)
            if not separator or isinstance(values, list) and len(values) == 1:
                overrides.append(word)
            elif key in parameters:
                raise InputError(f"command line: {key} is varied twice; write its values in one word")
            else:
                parameters[key] = values
        return cls(recipe, parameters, tuple(overrides), samples, seed)

    @classmethod
    def load(cls, file: SweepFile) -> "Sweep":
        """Takes a sweep from its file; a list is alternatives, a text may be a range, anything else is one value."""
        parameters: dict[str, list[str] | Range] = {}
        for key, value in file.parameters.items():
            values = _parse_range(key, value) if isinstance(value, str) else None
            parameters[key] = values or [_as_text(entry) for entry in (value if isinstance(value, list) else [value])]
        return cls(file.recipe, parameters, tuple(file.overrides), file.samples, file.seed)

    def points(self) -> list[dict[str, str]]:
        """Returns key -> value of each point, in a fixed order.

        InputError: nothing is varied, a range without `samples`, or an alternative that stands there twice.
        """
        if not self.parameters:
            raise InputError("a sweep needs a parameter with several values, as in options.rank=8,12")
        for key, values in self.parameters.items():
            if isinstance(values, Range) and self.samples is None:
                raise InputError(f"{key}: a range is drawn from, so say how often: --samples N")
            if isinstance(values, list) and len(set(values)) != len(values):
                raise InputError(f"{key}={','.join(values)}: names the same value twice")
        if self.samples is None:
            combinations = itertools.product(*self.parameters.values())
            return [dict(zip(self.parameters, values, strict=True)) for values in combinations]
        return self._draw()

    def _draw(self) -> list[dict[str, str]]:
        if not any(isinstance(values, Range) for values in self.parameters.values()):
            grid = Sweep(self.recipe, self.parameters, self.overrides).points()
            return random.Random(self.seed).sample(grid, min(self.samples, len(grid)))
        points = []
        for number in range(self.samples):
            # one generator per point and key: more samples, or one more key, leave the others as they are
            points.append(
                {
                    key: values.draw(generator) if isinstance(values, Range) else generator.choice(values)
                    for key, values in self.parameters.items()
                    for generator in [random.Random(digest_number("sweep", self.seed, number, key))]
                }
            )
        return points


@dataclass(frozen=True)
class Point:
    """One point of a sweep: what it varies, its configuration, or why it cannot be trained."""

    name: str
    values: dict[str, str]
    config: RunConfig | None = None
    refused: str | None = None


def make_points(sweep: Sweep, folder: Path, ranks: int = 1) -> list[Point]:
    """Returns the points of a sweep whose runs lie in `folder`, those that cannot be trained with the reason.

    ranks: of each run. InputError: the sweep names a run_dir.
    """
    return [make_point(sweep, values, folder, ranks) for values in sweep.points()]


def make_point(sweep: Sweep, values: dict[str, str], folder: Path, ranks: int = 1) -> Point:
    """Returns one point of a sweep, as `make_points` does."""
    if any(word.partition("=")[0] == "run_dir" for word in (*sweep.overrides, *sweep.parameters)):
        raise InputError("run_dir: every point of a sweep has its own; name the folder of all with --folder")
    name = point_name(values)
    words = [CHOICE, *sweep.overrides, *(f"{key}={value}" for key, value in values.items()), f"run_dir={folder / name}"]
    try:
        config = load_config(sweep.recipe, words, partial(check_run, ranks=ranks))
        _refuse_idle(config, values)
        earlier = folder / name / CONFIG_FILE
        if earlier.is_file() and (differences := config_differences(load_config(earlier), config)):
            raise InputError(f"its folder has another configuration: {'; '.join(differences)}; use another --folder")
    except InputError as error:
        return Point(name, values, refused=str(error))
    return Point(name, values, config)


def _refuse_idle(config: RunConfig, values: dict[str, str]) -> None:
    """Refuses what is varied for a method that trains nothing: its points would all be the same run."""
    idle = [key for key in values if key.split(".")[0] in ("train", "targets")]
    if idle and not method_class(config.method).trains:
        raise InputError(f"method={config.method} trains nothing: {idle[0]} makes no difference to it")


def point_name(values: dict[str, str]) -> str:
    """Returns the folder name of a point: its overrides, made harmless and short where they are neither."""
    plain = ",".join(f"{key}={value}" for key, value in values.items())
    name = re.sub(r"[^\w.,=+\-\[\]]", "_", plain)
    if name == plain and len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{digest_number('point', plain) % 16**8:08x}"


def split_alternatives(text: str) -> list[str]:
    """Splits at commas that stand in no bracket and no quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]


def _parse_range(key: str, text: str) -> Range | None:
    found = _RANGE.fullmatch(text.strip())
    if found is None:
        return None
    try:
        kind, low, high = found[1], float(found[2]), float(found[3])
    except ValueError as error:
        raise InputError(f"{key}={text}: a range has two numbers, as in uniform(0, 0.5)") from error
    if not low < high or kind == "loguniform" and low <= 0:
        raise InputError(f"{key}={text}: the first number must be the smaller one, and positive for loguniform")
    if kind == "integer" and not (low.is_integer() and high.is_integer()):
        raise InputError(f"{key}={text}: integer has whole numbers")
    return Range(kind, low, high)


def _as_text(value: Any) -> str:
    """Returns a value of a YAML file as it would be written in an override."""
    return value if isinstance(value, str) else json.dumps(value)
