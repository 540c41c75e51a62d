"""Streams: an ordered list of tasks, read from a `stream.yaml`.

name: mini_mtil
tasks:                                        # the default order
  - name: fashion
    train: [fashion/train-000000.tar]         # paths are relative to the file; braces count: train-{000000..000123}.tar
    validation: [fashion/validation-000000.tar]     # optional
    test: ["s3://bucket/fashion/test-000000.tar"]   # http(s), s3, gs, az and hf addresses as well
    class_names: fashion/classnames.txt       # one class per line; the line number, from 0, is the label
    templates: fashion/zeroshot_classification_templates.txt    # one per line, `{c}` stands for the class name
    sizes: {train: 160, validation: 40, test: 100}   # optional; samples per split
    domain: seen                              # optional; did the backbone's pretraining have this domain
orders: {second: [fashion, ...]}              # optional; further orders, each with every task once

A task of instructions, whose samples are conversations, has a metric in the place of class_names and templates; the
tasks of one stream are all of one kind:

  - name: chart_questions
    train: [charts/train-000000.tar]
    test: [charts/test-000000.tar]
    metric: exact_match                       # or vqa_accuracy, multiple_choice, rouge_l, cider
    max_new_tokens: 16                        # optional; the longest answer, 64 by default
    format: '[0-9]+|yes|no'                   # optional; answers that follow the instruction match it as a whole
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from braceexpand import UnbalancedBracesError, braceexpand

from r1p_dist.data.remote import PROTOCOLS, is_url
from r1p_dist.errors import InputError
from r1p_dist.files import read_text
from r1p_dist.safe_yaml import read_yaml

ASSETS = Path(__file__).resolve().parents[1] / "assets"
SPLITS = ("train", "validation", "test")
_STREAM_KEYS = ("name", "tasks", "orders")
METRICS = ("exact_match", "vqa_accuracy", "multiple_choice", "rouge_l", "cider")  # of instruction tasks
_CLASS_KEYS = ("class_names", "templates")
_ANSWER_KEYS = ("metric", "max_new_tokens", "format")
_TASK_KEYS = ("name", *SPLITS, *_CLASS_KEYS, *_ANSWER_KEYS, "sizes", "domain")
_TASK_KEYS_NEEDED = ("name", "train", "test")
_MOST_NEW_TOKENS = 4096
_DOMAINS = ("seen", "unseen")
_MOST_SHARDS = 100_000


@dataclass(frozen=True)
class Task:
    """One task of a stream: its shards per split, and what is asked of the model.

    Classification: class names (label = position) and prompt templates, scored by `accuracy`. Instructions: no classes
    and no templates, but another metric, the longest answer in tokens, and the regular expression that an answer in
    the wanted format matches as a whole.
    """

    name: str
    train: tuple[Path | str, ...]
    validation: tuple[Path | str, ...]
    test: tuple[Path | str, ...]
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    sizes: dict[str, int]
    domain: str | None
    metric: str = "accuracy"
    max_new_tokens: int = 64
    format: str | None = None

    @property
    def is_instruction(self) -> bool:
        """Whether its samples are conversations, not pictures of classes."""
        return self.metric != "accuracy"

    def prompt(self, label: int) -> str:
        """Return the training prompt of a class: the first template."""
        return self.prompts(label)[0]

    def prompts(self, label: int) -> list[str]:
        """Return the prompts of a class, one per template."""
        # Not str.format: class names and templates may have braces of their own.
        return [template.replace("{c}", self.class_names[label]) for template in self.templates]


@dataclass(frozen=True)
class Stream:
    """An ordered list of tasks; `path` is the stream file, `known` the names of all tasks in it, chosen or not."""

    name: str
    tasks: tuple[Task, ...]
    path: Path
    known: tuple[str, ...]

    @classmethod
    def load(cls, path_or_name: str | Path, order: str | None = None, tasks: Sequence[str] | None = None) -> Stream:
        """Return the stream of a `stream.yaml` (or of the folder it is in), or the shipped stream of that name.

        `order` names one of the file's orders; `tasks` picks tasks by name and sets their order itself.
        InputError: missing or wrong file, unknown key, order or task, missing shard, unusable classes or templates,
        tasks of both kinds.
        """
        path = _find_stream_file(path_or_name)
        content = _read_yaml(path)
        _check_keys(content, _STREAM_KEYS, ("name", "tasks"), f"{path}")
        name = _text(content["name"], f"{path}: name")
        entries = _task_entries(content["tasks"], path)
        orders = _orders(content.get("orders"), entries, path)
        chosen = list(entries)
        if order is not None:
            _check_known(order, orders, "order", path)
            chosen = orders[order]
        if tasks is not None:
            for task in tasks:
                _check_known(task, entries, "task", path)
            chosen = list(tasks)
            if not chosen or len(set(chosen)) != len(chosen):
                raise InputError(f"{path}: tasks must name each wanted task once, got {chosen}")
        loaded = tuple(_load_task(entries[task], path) for task in chosen)
        check_one_kind(loaded, f"{path}")
        return cls(name, loaded, path, tuple(entries))

    def extended(self, more: Sequence[str]) -> Stream:
        """Return this stream with tasks of others behind its own: `STREAM:TASK` for one, `STREAM` for all of them.

        InputError: no such stream or task, a task's name that the stream has already, or a task of the other kind.
        """
        tasks = list(self.tasks)
        for entry in more:
            other, _, task = entry.rpartition(":") if ":" in entry else (entry, "", "")
            for added in Stream.load(other, tasks=[task] if task else None).tasks:
                if added.name in [known.name for known in tasks]:
                    raise InputError(f"extend: {entry}: the stream has a task {added.name!r} already")
                tasks.append(added)
                check_one_kind(tasks, f"extend: {entry}")
        return replace(self, tasks=tuple(tasks), known=(*self.known, *(t.name for t in tasks[len(self.tasks) :])))

    def check_names(self, names: Iterable[str], key: str) -> None:
        """Raises InputError, with the configuration's key, for a name that is no task of the stream file."""
        for name in names:
            _check_known(name, self.known, "task", key)


def check_one_kind(tasks: Sequence[Task], where: str) -> None:
    """Raises InputError, beginning with `where`, for tasks of classes beside tasks of conversations."""
    other = next((task for task in tasks if task.is_instruction != tasks[0].is_instruction), None)
    if other is not None:
        classes, conversations = (tasks[0], other) if other.is_instruction else (other, tasks[0])
        raise InputError(
            f"{where}: task {classes.name} has classes and task {conversations.name} conversations; the tasks of a run "
            "must be of one kind: make a stream of each"
        )


def _find_stream_file(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.is_dir():
        path = path / "stream.yaml"
    if path.is_file():
        return path
    packaged = ASSETS / path_or_name / "stream.yaml"
    if len(path.parts) == 1 and packaged.is_file():
        return packaged
    shipped = sorted(file.parent.name for file in ASSETS.glob("*/stream.yaml"))
    raise InputError(
        f"stream={path_or_name}: no such stream file, and no stream of that name is shipped"
        f"{_nearest(str(path_or_name), shipped)}; give the path of a stream.yaml or one of: {', '.join(shipped)}"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a mapping with the keys {', '.join(_STREAM_KEYS)}")
    return content


def _task_entries(value: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Return task name -> its checked mapping, in the file's order."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{path}: tasks must be a list with at least one task, got {value!r}")
    entries: dict[str, dict[str, Any]] = {}
    for index, entry in enumerate(value):
        where = f"{path}: tasks[{index}]"
        if not isinstance(entry, dict):
            raise InputError(f"{where}: must be a mapping with the keys {', '.join(_TASK_KEYS)}, got {entry!r}")
        _check_keys(entry, _TASK_KEYS, _TASK_KEYS_NEEDED, where)
        _check_kind(entry, where)
        name = _text(entry["name"], f"{where}.name")
        # A task's name becomes a folder of the run.
        if name.startswith(".") or any(character in name for character in "/\\\0\n"):
            raise InputError(f"{where}.name: {name!r} cannot name a folder; use letters, digits, '_' and '-'")
        if name in entries:
            raise InputError(f"{where}.name: {name} stands twice in the file; give each task its own name")
        entries[name] = entry
    return entries


def _check_kind(entry: dict[str, Any], where: str) -> None:
    """Raises InputError for a task that has keys of both kinds, or not those of one."""
    given = [key for key, value in entry.items() if value is not None]
    if "metric" in given:
        if classes := [key for key in _CLASS_KEYS if key in given]:
            raise InputError(
                f"{where}: has both '{classes[0]}' and 'metric'; leave out '{classes[0]}' if its samples are "
                "conversations, 'metric' if they are pictures of classes"
            )
        return
    for key in _CLASS_KEYS:
        if key not in given:
            raise InputError(f"{where}: key '{key}' is missing; a task of conversations needs 'metric' instead")
    for key in _ANSWER_KEYS:
        if key in given:
            raise InputError(f"{where}: '{key}' is for tasks of conversations, which have a 'metric'; leave it out")


def _orders(value: Any, entries: dict[str, dict], path: Path) -> dict[str, list[str]]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: orders must map a name to a list of tasks, got {value!r}")
    for order, names in value.items():
        if not isinstance(names, list):
            raise InputError(f"{path}: orders.{order}: must be a list of tasks, got {names!r}")
        for name in names:
            _check_known(name, entries, "task", f"{path}: orders.{order}")
        if sorted(names) != sorted(entries):
            missing = [name for name in entries if name not in names]
            fault = f"{', '.join(missing)} missing" if missing else "a task stands twice"
            raise InputError(f"{path}: orders.{order}: must have every task once: {fault}")
    return value


def _load_task(entry: dict[str, Any], path: Path) -> Task:
    where = f"{path}: task {entry['name']}"
    shards = {split: _shards(entry.get(split), path, f"{where}.{split}", split) for split in SPLITS}
    own = answer_fields(entry, where) if entry.get("metric") is not None else _class_fields(entry, path, where)
    domain = entry.get("domain")
    if domain is not None and domain not in _DOMAINS:
        raise InputError(f"{where}.domain: must be one of {', '.join(_DOMAINS)}, got {domain!r}")
    sizes = _sizes(entry.get("sizes"), f"{where}.sizes")
    return Task(entry["name"], **shards, **own, sizes=sizes, domain=domain)


def _class_fields(entry: dict[str, Any], path: Path, where: str) -> dict[str, Any]:
    return {
        "class_names": read_class_names(_text_file(entry["class_names"], path, f"{where}.class_names")),
        "templates": read_templates(_text_file(entry["templates"], path, f"{where}.templates")),
    }


def answer_fields(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of a task of conversations. InputError: an unknown metric, no number, no regular expression."""
    fields: dict[str, Any] = {"class_names": (), "templates": (), "metric": entry["metric"]}
    if fields["metric"] not in METRICS:
        raise InputError(f"{where}.metric: must be one of {', '.join(METRICS)}, got {fields['metric']!r}")
    if (longest := entry.get("max_new_tokens")) is not None:
        if not isinstance(longest, int) or isinstance(longest, bool) or not 1 <= longest <= _MOST_NEW_TOKENS:
            raise InputError(
                f"{where}.max_new_tokens: must be a number of tokens from 1 to {_MOST_NEW_TOKENS}, got {longest!r}"
            )
        fields["max_new_tokens"] = longest
    if (pattern := entry.get("format")) is not None:
        fields["format"] = _pattern(pattern, f"{where}.format")
    return fields


def _pattern(value: Any, where: str) -> str:
    try:
        re.compile(_text(value, where))
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: {value!r} is no regular expression: {error}") from error
    return value


def _shards(value: Any, path: Path, where: str, split: str) -> tuple[Path | str, ...]:
    if value is None and split == "validation":
        return ()
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: must be a list of shards (.tar files), got {value!r}")
    shards = tuple(_shard(name, path, where) for entry in value for name in _expand(_text(entry, where), where))
    if len(set(shards)) != len(shards):
        raise InputError(f"{where}: the same shard stands twice; name each shard once")
    return shards


def _expand(text: str, where: str) -> list[str]:
    # braceexpand makes all numbers of a range before it gives the first
    for first, last, step in re.findall(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}", text):
        if abs(int(last) - int(first)) // max(1, int(step or 1)) >= _MOST_SHARDS:
            raise InputError(f"{where}: {text}: stands for more than {_MOST_SHARDS} shards")
    try:
        names = list(itertools.islice(braceexpand(text), _MOST_SHARDS + 1))
    except UnbalancedBracesError as error:
        raise InputError(f"{where}: {text}: {error}") from error
    if len(names) > _MOST_SHARDS:
        raise InputError(f"{where}: {text}: stands for more than {_MOST_SHARDS} shards")
    return names


def _shard(name: str, path: Path, where: str) -> Path | str:
    if is_url(name):
        return name
    # webdataset would run `pipe:` as a command; here nothing but these addresses and files is opened.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name) and not (path.parent / name).is_file():
        raise InputError(f"{where}: {name!r} is no address of {', '.join(PROTOCOLS)}, and commands are never run")
    shard = path.parent / name
    if not shard.is_file():
        raise InputError(f"{where}: shard {shard} is missing; paths are relative to the stream file")
    return shard


def _text_file(value: Any, path: Path, where: str) -> Path:
    file = path.parent / _text(value, where)
    if not file.is_file():
        raise InputError(f"{where}: {file} is missing; paths are relative to the stream file")
    return file


def read_class_names(file: Path) -> tuple[str, ...]:
    """Return the lines of a class list, without white space at their ends. InputError: no line or an empty one."""
    return _lines(file)


def read_templates(file: Path) -> tuple[str, ...]:
    """Return the prompt templates of a file, one per line. InputError: none, an empty line, or one without `{c}`."""
    templates = _lines(file)
    for number, template in enumerate(templates, 1):
        if "{c}" not in template:
            raise InputError(f"{file}: line {number}: '{template}' lacks {{c}}, the place of the class name")
    return templates


def _lines(file: Path) -> tuple[str, ...]:
    lines = [line.strip() for line in read_text(file).rstrip().split("\n")]
    if lines == [""]:
        raise InputError(f"{file}: is empty; write one entry per line")
    # The line number is the label, so an empty line must not be dropped in silence.
    if "" in lines:
        raise InputError(f"{file}: line {lines.index('') + 1} is empty; remove or fill it")
    return tuple(lines)


def _sizes(value: Any, where: str) -> dict[str, int]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: must map {', '.join(SPLITS)} to a number of samples, got {value!r}")
    _check_keys(value, SPLITS, (), where)
    for split, size in value.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise InputError(f"{where}.{split}: must be a number of samples, got {size!r}")
    return dict(value)


def _text(value: Any, where: str) -> str:
    # YAML reads an unquoted 101 as a number; a name or path must come as the user wrote it.
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: must be text (put it in quotes), got {value!r}")
    return value


def _check_keys(mapping: dict, allowed: Collection[str], needed: Collection[str], where: str) -> None:
    for key in mapping:
        if key not in allowed:
            raise InputError(
                f"{where}: unknown key {key!r}{_nearest(str(key), allowed)}; allowed: {', '.join(allowed)}"
            )
    for key in needed:
        if mapping.get(key) is None:
            raise InputError(f"{where}: key '{key}' is missing")


def _check_known(name: Any, known: Collection[str], kind: str, where: Path | str) -> None:
    if name not in list(known):
        choice = f"known: {', '.join(known)}" if known else f"the file has no {kind}s"
        raise InputError(f"{where}: unknown {kind} {name!r}{_nearest(str(name), known)}; {choice}")


def _nearest(name: str, known: Collection[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (nearest: {matches[0]})" if matches else ""
