"""One self-contained page about a run: what it learned, what it kept, how training went.

Reads what a run folder has (metrics.json; log.jsonl, answers.jsonl and config.yaml where there) and writes report.html
beside it.
Figures are PNGs inside the page, so it opens anywhere and can be mailed.
"""

import json
from pathlib import Path
from typing import Any

from r1p_dist.errors import InputError
from r1p_dist.figures import (
    ScoreMatrix,
    change_from,
    curves_figure,
    matrix_figure,
    mean_of,
    merge_figure,
    pad_row,
    png_of,
)
from r1p_dist.files import write_atomically
from r1p_dist.page import figure, number, page, table, text
from r1p_dist.run_files import ANSWERS_FILE, CONFIG_FILE, LOG_FILE, METRICS_FILE, REPORT_FILE

MEANINGS = {
    "transfer": ("Transfer", "{quantity} on tasks not trained yet: how much zero-shot ability is kept"),
    "average": ("Average", "mean over all tasks and all moments of the stream"),
    "last": ("Last", "mean over all tasks after the last one"),
    "mft": ("Own task (MFT)", "mean {quantity} on each task right after its own training"),
    "mfn": ("Final (MFN)", "the same number as Last, under the name of the multimodal benchmarks"),
    "maa": ("MAA", "mean over the stream of the mean over the tasks seen so far"),
    "bwt": ("Backward transfer", "change of the earlier tasks since their own training, 1/(T-1)"),
    "bwt_coin": ("Backward transfer (CoIN)", "the same, with the last task counted, 1/T: MFN - MFT"),
    "forgetting": ("Forgetting", "loss of the earlier tasks since their best moment; lower is better"),
}
DOMAINS = {
    "seen": "the backbone's pretraining has pictures of this kind",
    "unseen": "new to the backbone",
}
EXAMPLES = 3  # answers per task
LONGEST_EXAMPLE = 200  # characters


def write_report(run_dir: Path) -> None:
    """Write run_dir/report.html from metrics.json and, where they are there, log.jsonl, answers.jsonl and config.yaml.

    Raises InputError when metrics.json is missing or is not a run's metrics.
    """
    run_dir = Path(run_dir)
    metrics = _read_metrics(run_dir / METRICS_FILE)
    log, answers = _read_lines(run_dir / LOG_FILE), _read_lines(run_dir / ANSWERS_FILE)
    config = run_dir / CONFIG_FILE
    page = _page(metrics, log, answers, config.read_text(encoding="utf-8") if config.is_file() else None)
    write_atomically(run_dir / REPORT_FILE, page)


def plot_matrix(run_dir: Path, path: Path) -> None:
    """Write the score matrix of a run as a PNG: numbers are the scores, colour is the change against zero-shot.

    Raises InputError as `write_report`.
    """
    metrics = _read_metrics(Path(run_dir) / METRICS_FILE)
    write_atomically(Path(path), png_of(matrix_figure(ScoreMatrix.read(metrics))))


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; a report is made from the folder of a run that evaluated once") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); was it edited?") from None
    for key in ("tasks", "accuracy"):
        if not isinstance(metrics, dict) or not isinstance(metrics.get(key), list):
            raise InputError(f"{path}: key {key} is missing or no list; this is not the metrics.json of a run")
    return metrics


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file, none where it is missing; a last line that a kill cut off is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict)]


def _page(metrics: dict[str, Any], log: list[dict[str, Any]], answers: list[dict[str, Any]], config: str | None) -> str:
    matrix = ScoreMatrix.read(metrics)
    title = f"{metrics.get('method') or 'run'} on {len(matrix.tasks)} task{'s' * (len(matrix.tasks) != 1)}"
    sections = [
        f'<h1>{text(title)}</h1>\n<p class="facts">{text(_facts(metrics))}</p>',
        _metrics_section(metrics, matrix),
        _matrix_section(matrix),
        _tasks_section(metrics, matrix),
        _domains_section(metrics, matrix),
        _following_section(metrics),
        _answers_section(answers, matrix),
        _curves_section(log),
    ]
    if config is not None:
        sections.append(
            f"<h2>Configuration</h2>\n<details><summary>config.yaml</summary><pre>{text(config)}</pre></details>"
        )
    return page(title, sections)


def _facts(metrics: dict[str, Any]) -> str:
    looks = {
        "seed": "seed {}",
        "world_size": "world size {}",
        "zero_stage": "ZeRO stage {}",
        "trainable_parameters": "{:,} trainable parameters",
    }
    facts = [look.format(metrics[key]) for key, look in looks.items() if metrics.get(key) is not None]
    if collectives := metrics.get("collectives_per_step"):
        calls, sent = (sum(entry[key] for entry in collectives.values()) for key in ("calls", "bytes"))
        facts.append(f"{calls} collectives with {sent / 1e6:.2f} MB per step")
    if metrics.get("wall_seconds") is not None:
        facts.append(f"{metrics['wall_seconds'] / 60:.1f} minutes")
    return " · ".join(facts)


def _metrics_section(metrics: dict[str, Any], matrix: ScoreMatrix) -> str:
    rows = [
        [name, number(metrics.get(key)), meaning.format(quantity=matrix.quantity)]
        for key, (name, meaning) in MEANINGS.items()
    ]
    zero_shot = number(mean_of(matrix.zero_shot))
    rows.append(["Zero-shot", zero_shot, "mean over all tasks before any training, the reference for all above"])
    summary = table(["", matrix.unit, ""], rows, numbers={1}, meaning=2)
    return f"<h2>Figures</h2>\n{summary}{_bad_samples(metrics, matrix)}"


def _bad_samples(metrics: dict[str, Any], matrix: ScoreMatrix) -> str:
    """Return a line on samples that could not be used; nothing where all could."""
    bad = metrics.get("bad_samples", {})
    kind = "pictures" if matrix.quantity == "accuracy" else "conversations"
    left_out = [
        f"{count} {kind} of {task}"
        for task, count in zip(matrix.tasks, bad.get("evaluation", []), strict=False)
        if count
    ]
    parts = [f"left out of the evaluation: {', '.join(left_out)}"] if left_out else []
    if sum(bad.get("train", [])):
        parts.append(f"replaced by their neighbours in training: {sum(bad['train'])}")
    return f"<p>Samples that cannot be decoded; {text('; '.join(parts))}.</p>\n" if parts else ""


def _matrix_section(matrix: ScoreMatrix) -> str:
    if not matrix.tasks:
        return ""
    caption = (
        f"Results on the test sets ({'; '.join(dict.fromkeys(matrix.scales))}); a row per moment of the stream, a "
        "column per task. Colour is the change against the zero-shot row: blue better, red worse. A framed cell is a "
        "task right after its own training; the tasks left of it were trained before, those right of it are still to "
        "come."
    )
    name = f"{matrix.quantity} matrix"
    return f"<h2>{name.capitalize()}</h2>\n" + figure(matrix_figure(matrix), name, caption)


def _tasks_section(metrics: dict[str, Any], matrix: ScoreMatrix) -> str:
    if not matrix.tasks:
        return ""
    domains, before = (pad_row(metrics.get(key), len(matrix.tasks)) for key in ("domains", "before_merge"))
    rows = [
        [
            name,
            matrix.scales[i],
            domains[i] or "–",
            *(number(values[i]) for values in (matrix.zero_shot, before, matrix.own, matrix.now)),
            number(change_from(matrix.zero_shot[i], matrix.now[i]), signed=True),
        ]
        for i, name in enumerate(matrix.tasks)
    ]
    header = [
        "task",
        "metric",
        "domain",
        "zero-shot",
        "before merge",
        "after merge",
        "last row",
        "last row - zero-shot",
    ]
    section = "<h2>Tasks</h2>\n"
    if any(value is not None for value in before):
        caption = "Each task around its own merge: what its training reached, and what the merged weight keeps of it."
        name = f"{matrix.quantity} before and after each merge"
        section += figure(merge_figure(matrix, before), name, caption) + "\n"
    return section + table(header, rows, numbers=set(range(3, 8)))


def _domains_section(metrics: dict[str, Any], matrix: ScoreMatrix) -> str:
    domains = pad_row(metrics.get("domains"), len(matrix.tasks))
    rows = []
    for domain, meaning in DOMAINS.items():
        members = [i for i, name in enumerate(domains) if name == domain]
        if members:
            before = mean_of(matrix.zero_shot[i] for i in members)
            now = mean_of(matrix.now[i] for i in members)
            change = number(change_from(before, now), signed=True)
            rows.append([domain, str(len(members)), number(before), number(now), change, meaning])
    if not rows:
        return ""
    header = ["domain", "tasks", "zero-shot", "last row", "change", ""]
    return "<h2>Seen and unseen domains</h2>\n" + table(header, rows, numbers={1, 2, 3, 4}, meaning=5)


def _following_section(metrics: dict[str, Any]) -> str:
    if not metrics.get("instruction_following"):
        return ""
    following = ScoreMatrix.read(metrics, "instruction_following")
    moments = (following.zero_shot, following.own, following.now)
    rows = [[name, *(number(values[i]) for values in moments)] for i, name in enumerate(following.tasks)]
    rows.append(["mean", *(number(mean_of(values)) for values in moments)])
    header = ["task", "zero-shot", "after its own training", "last row"]
    return (
        "<h2>Instruction following</h2>\n"
        "<p>Percent of the answers, right or wrong, that have the form the instruction asks for.</p>\n"
        + table(header, rows, numbers={1, 2, 3})
    )


def _answers_section(answers: list[dict[str, Any]], matrix: ScoreMatrix) -> str:
    """Return some answers of each task's last evaluation that the matrix has; nothing without answers.

    answers: records of answers.jsonl.
    """
    latest: dict[str, list[str]] = {}
    for record in sorted(answers, key=lambda record: record["row"]):
        if record["row"] <= len(matrix.trained):
            latest[record["task"]] = record["answers"]
    rows = []
    for task in matrix.tasks:
        texts = latest.get(task, [])
        # Spread over the test set, where samples of one class may stand together.
        rows += [[task, _example(answer)] for answer in texts[:: max(1, len(texts) // EXAMPLES)][:EXAMPLES]]
    return "<h2>Example answers, last row</h2>\n" + table(["task", "answer"], rows, numbers=set()) if rows else ""


def _example(answer: str) -> str:
    """Return an answer in quotes on one line, cut where it is long; what cannot be shown becomes U+FFFD."""
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(answer.split()))
    return f"“{line}”" if len(line) <= LONGEST_EXAMPLE else f"“{line[:LONGEST_EXAMPLE]}…”"


def _curves_section(log: list[dict[str, Any]]) -> str:
    curves = curves_figure(log)
    if curves is None:
        return ""
    caption = "One task after another; a grey line is where a new task begins."
    return "<h2>Training</h2>\n" + figure(curves, "loss and learning rate per task", caption)
