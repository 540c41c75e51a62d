"""What each method of a comparison gets beside the recipe: a YAML file of label -> list of key=value."""

from collections.abc import Mapping
from pathlib import Path

from r1p_dist.errors import InputError
from r1p_dist.methods import shipped_methods
from r1p_dist.safe_yaml import read_yaml
from r1p_dist.shipped import checkout

ALL = "all"


def settings_path(recipe: str) -> Path:
    """Returns where a checkout has the settings of a recipe, a name or a file. InputError: this is none."""
    root = checkout()
    if root is None:
        raise InputError("--settings: missing; only a checkout has settings of its own, so write a file and name it")
    return root / "tools" / f"compare_{Path(recipe).stem}.yaml"


def read_settings(path: Path) -> dict[str, list[str]]:
    """Return label -> overrides of a settings file."""
    if not path.is_file():
        raise InputError(f"--settings {path}: no such file; write it or name another one with --settings")
    settings = read_yaml(path) or {}
    if not isinstance(settings, dict):
        raise InputError(f"{path}: has to be a mapping of method label to a list of key=value")
    for label, overrides in settings.items():
        if not isinstance(overrides, list) or not all(isinstance(item, str) and "=" in item for item in overrides):
            raise InputError(f"{path}: {label}: {overrides!r} is not a list of key=value texts")
    return {str(label): overrides for label, overrides in settings.items()}


def labels_of(asked: str | None, settings: Mapping[str, list[str]]) -> list[str]:
    """Return the labels to compare, each once: those asked for, comma-separated, else all of the settings file.

    `all` stands for those and every shipped method that is no label there.
    """
    if not asked:
        return list(settings)
    labels = []
    for label in asked.split(","):
        labels += [*settings, *shipped_methods()] if label == ALL else [label]
    return list(dict.fromkeys(labels))
