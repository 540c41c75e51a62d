"""Writes report.html from what a run folder has: metrics.json, and whatever else is there.

It is written after every task, so all of it together takes a moment: pictures and layers are few, however many there
are.
"""

from pathlib import Path
from urllib.parse import quote

from r1p_dist.evaluation.score_matrix import ScoreMatrix
from r1p_dist.files import write_atomically
from r1p_dist.page.parts import Code, Columns, Link, Page, Part, Section, Table
from r1p_dist.page.render import render_page
from r1p_dist.report import answers, classes, experts, overview, scores, training
from r1p_dist.report.run import RunFiles
from r1p_dist.run_files import (
    ADAPTERS,
    ANSWERS_FILE,
    CHECKPOINTS,
    CONFIG_FILE,
    CORRECT_FILE,
    LAUNCH_LOG,
    LOG_FILE,
    METRICS_FILE,
    REPORT_FILE,
    STATUS_FILE,
    TASKS_FILE,
)

_FILES = {
    METRICS_FILE: "the matrix and the figures made of it",
    LOG_FILE: "loss and its terms, learning rate, samples per second",
    CORRECT_FILE: "which test samples were right after which task",
    ANSWERS_FILE: "the answers of every evaluation",
    CONFIG_FILE: "the resolved configuration; a recipe itself",
    TASKS_FILE: "class names and templates of each task",
    STATUS_FILE: "what the run is doing",
    LAUNCH_LOG: "what DeepSpeed, torch and the compiler print",
    f"{ADAPTERS}/": "what each task left",
    f"{CHECKPOINTS}/": "what the run resumes from",
    "tensorboard/": "the log for TensorBoard",
}


def write_report(run_dir: Path) -> None:
    """Write run_dir/report.html.

    Raises InputError when metrics.json is missing or is not a run's metrics.
    """
    run = RunFiles.read(Path(run_dir))
    write_atomically(run.folder / REPORT_FILE, render_page(report_page(run)))


def plot_matrix(run_dir: Path, path: Path) -> None:
    """Write the score matrix of a run as a PNG: numbers are the scores, colour is the change against zero-shot.

    Raises InputError as `write_report`.
    """
    from r1p_dist.figures import matrix_figure, png_of  # draws with a library that the page does without

    metrics = RunFiles.read(Path(run_dir)).metrics
    write_atomically(Path(path), png_of(matrix_figure(ScoreMatrix.read(metrics))))


def report_page(run: RunFiles, has_files: bool = True) -> Page:
    """Return the page of a run. has_files: whether the run's files lie beside it, to be linked."""
    judged = classes.judged(run)
    sections = [
        Section("Figures", overview.figures(run)),
        Section(f"{run.matrix.quantity.capitalize()} matrix", scores.matrix(run)),
        Section("Tasks", scores.tasks(run)),
        Section("Forgetting", scores.forgetting(run)),
        Section("Instruction following", answers.following(run)),
        Section("Classes", classes.classes(judged)),
        Section("Example pictures", classes.examples(judged)),
        Section("Example answers, last row", answers.examples(run)),
        Section("Training", training.curves(run)),
        Section("Layers and experts", experts.layers(run)),
        Section("Configuration and files", _configuration(run, has_files)),
    ]
    return Page(overview.title(run), overview.sentence(run), overview.facts(run), overview.tiles(run), sections)


def _configuration(run: RunFiles, has_files: bool) -> list[Part]:
    tables = []
    versions = run.metrics.get("versions")
    if isinstance(versions, dict) and versions:
        rows = [[str(name), str(version)] for name, version in versions.items()]
        tables.append(Table(["Library", "Version"], rows))
    there = [name for name in _FILES if (run.folder / name).exists()] if has_files else []
    if there:
        rows = [[Link(name, quote(name)), _FILES[name]] for name in there]
        tables.append(Table(["File", "What it says"], rows, meaning=1))
    parts: list[Part] = [Code(CONFIG_FILE, run.config_text)] if run.config_text else []
    return [*parts, Columns(tables, is_wide=True)] if tables else parts
