"""RUN/tasks.json: what each task asks of the model, so that a run's folder or an export predicts without the shards.

{"tasks": [{"name": "fashion", "class_names": ["shirt", ...], "templates": ["a photo of a {c}.", ...]},
           {"name": "chart_questions", "metric": "exact_match", "max_new_tokens": 16, "format": null}]}

The keys are those of a stream.yaml; a task has those of classes or those of conversations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1p_dist.data.stream import Stream, Task, answer_fields
from r1p_dist.errors import InputError
from r1p_dist.files import read_text, write_atomically
from r1p_dist.run_files import TASKS_FILE

if TYPE_CHECKING:
    from r1p_dist.config import RunConfig


def write_tasks(folder: Path, tasks: Sequence[Task]) -> None:
    """Write tasks.json into a folder."""
    content = {"tasks": [_as_json(task) for task in tasks]}
    write_atomically(folder / TASKS_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _as_json(task: Task) -> dict[str, Any]:
    if task.is_instruction:
        fields: dict[str, Any] = {"metric": task.metric, "max_new_tokens": task.max_new_tokens, "format": task.format}
    else:
        fields = {"class_names": task.class_names, "templates": task.templates}
    return {"name": task.name, **fields}


def read_tasks(file: Path) -> tuple[Task, ...]:
    """Return the tasks of a tasks.json, without shards. InputError: it is none, or a task lacks something."""
    text = read_text(file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not JSON: {error}") from error
    entries = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{file}: needs a list `tasks`")
    tasks = tuple(_task(entry, f"{file}: tasks[{number}]") for number, entry in enumerate(entries))
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{file}: task {twice[0]} stands twice")
    return tasks


def _task(entry: Any, where: str) -> Task:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise InputError(f"{where}: needs a `name`, as text")
    if "metric" in entry:
        fields = answer_fields(entry, where)
    else:
        fields = {key: _texts(entry.get(key), f"{where}.{key}") for key in ("class_names", "templates")}
        for template in fields["templates"]:
            if "{c}" not in template:
                raise InputError(f"{where}.templates: '{template}' lacks {{c}}, the place of the class name")
    return Task(entry["name"], (), (), (), **fields, sizes={}, domain=None)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise InputError(f"{where}: must be a list of texts that are not empty")
    return tuple(value)


def tasks_of_run(run_dir: Path, config: RunConfig) -> tuple[Task, ...]:
    """Return the tasks of a run: those of its tasks.json, or of its stream for a run that was begun without the file.

    InputError: the file is damaged, or there is none and the stream is gone.
    """
    if (run_dir / TASKS_FILE).is_file():
        return read_tasks(run_dir / TASKS_FILE)
    try:
        return Stream.load(config.stream, config.order, config.tasks).extended(config.extend).tasks
    except InputError as error:
        raise InputError(f"{run_dir}: has no {TASKS_FILE}, being a run of before, and its stream: {error}") from error
