"""The story of an export: read the run, then write its model or its tasks' updates as a new folder."""

import logging
from collections.abc import Sequence
from pathlib import Path

from r1p_dist.data.task_list import tasks_of_run, write_tasks
from r1p_dist.errors import InputError
from r1p_dist.export.finished_run import FinishedRun, load_run
from r1p_dist.export.output_folder import check_is_free, new_folder
from r1p_dist.export.part import export_part
from r1p_dist.export.peft_folder import write_peft
from r1p_dist.export.safetensors_writer import DTYPES


def export_run(
    run_dir: Path,
    to: str,
    output: Path | None = None,
    *,
    tasks: Sequence[str] | None = None,
    dtype: str | None = None,
    with_base: bool = False,
) -> Path:
    """Writes the export of a run as a new folder and returns its path.

    to: one of FORMATS. output: RUN/export/FORMAT by default. tasks: the tasks that take part, by name; all finished
    ones by default. dtype: fp32, bf16 or fp16, what the weights are rounded to, once, after the merge; by default fp32
    for a CLIP and for adapters, the type of the base model's files for a LLaVA. fp32 loses nothing of the base model or
    of small updates, is what open_clip loads by default, and does not depend on the machine; a run in bf16 rounds the
    base weights before the merge as well. with_base: for PEFT, the base model too.
    InputError: no finished run, an unknown task, a model that the format cannot express, a folder that is in use.
    """
    if with_base and to != "peft":
        raise InputError(f"--with-base: --to {to} holds the whole model already; leave it out, or use --to peft")
    output = output or run_dir / "export" / to
    check_is_free(output)
    rounded = None if dtype is None else DTYPES[dtype]
    run = load_run(run_dir, tasks)
    with new_folder(output) as folder:
        part = export_part(run.config.backbone)
        if to == "peft":
            write_peft(folder, run, rounded, with_base)
        elif to == "hf":
            part.hf_model(run).write(folder, run.deployed, rounded)
        elif to in part.WRITERS:
            part.WRITERS[to](folder, run, rounded)
        else:
            kind = run.config.backbone.kind
            raise InputError(f"backbone.kind={kind}: {to} has no such model; export it with --to hf or --to peft")
        _write_tasks(folder, run)
    return output


def _write_tasks(folder: Path, run: FinishedRun) -> None:
    """Writes what the tasks ask of the model, for `r1p predict FOLDER`; a model is worth writing without it."""
    try:
        tasks = tasks_of_run(run.path, run.config)
    except InputError as error:
        logging.getLogger(__name__).warning("%s; the export has no class names then", error)
        return
    write_tasks(folder, tasks)
