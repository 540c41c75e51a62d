"""Take one task out of a finished run: the pristine weights plus the other tasks' merged experts, nothing retrained."""

import json
import os
import shutil
from pathlib import Path

from r1p_dist.backbones import Placement, load_backbone
from r1p_dist.checkpoint import load_updates
from r1p_dist.data import Stream, evaluation_loaders
from r1p_dist.engine import start_process_group
from r1p_dist.errors import InputError
from r1p_dist.evaluation.make import make_evaluator
from r1p_dist.files import write_atomically
from r1p_dist.methods import make_method
from r1p_dist.precision import precision_type
from r1p_dist.recipes import load_config
from r1p_dist.run_files import ADAPTERS, CONFIG_FILE, METRICS_FILE, UPDATES_FILE, stage_folder


def forget(run_dir: Path, task: str) -> dict:
    """Evaluates the run's model without a task and writes RUN/without-TASK: metrics.json and the other adapters.

    Returns {"forgotten", "tasks", "with": accuracies of the run, "without": those now}. InputError: no finished task of
    that name, or a method whose tasks cannot be told apart in the weights.
    """
    config = load_config(run_dir / CONFIG_FILE, [f"run_dir={run_dir}"])
    stream = Stream.load(config.stream, config.order, config.tasks).extended(config.extend)
    finished = {
        name: folder
        for index, name in enumerate(stream_task.name for stream_task in stream.tasks)
        if (folder := stage_folder(run_dir, index, name)).is_dir()
    }
    if task not in finished:
        raise InputError(f"{run_dir}: no finished task {task!r}; there are {', '.join(finished) or 'none'}")
    device = start_process_group()
    backbone = load_backbone(config.backbone, Placement(device, precision_type(config.train.precision)))
    method = make_method(config, backbone)
    if not method.tasks_add_up:
        raise InputError(f"{run_dir}: {config.method} keeps one update for all tasks, so none can be taken out alone")
    kept = [folder for name, folder in finished.items() if name != task]
    places = method.update_places()
    method.set_merged([load_updates(folder / UPDATES_FILE, places, device) for folder in kept])
    loaders = evaluation_loaders(config, stream.tasks, backbone.encoder(config.data))
    results = make_evaluator(config.evaluation, backbone, loaders).evaluate(backbone, stream.tasks)
    before = json.loads((run_dir / METRICS_FILE).read_text(encoding="utf-8"))["accuracy"][-1]
    found = {
        "forgotten": task,
        "tasks": [result.task for result in results],
        "with": before,
        "without": [result.score for result in results],
    }
    output = run_dir / f"without-{task}"
    shutil.rmtree(output, ignore_errors=True)
    for folder in kept:
        target = output / ADAPTERS / folder.name
        target.mkdir(parents=True)
        for file in folder.iterdir():
            os.link(file, target / file.name)
    write_atomically(output / METRICS_FILE, json.dumps(found, indent=2) + "\n")
    return found
