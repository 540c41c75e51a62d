"""What a run of instructions answered, and whether its answers have the form that was asked for."""

from r1p_dist.evaluation.score_matrix import ScoreMatrix, mean_of
from r1p_dist.page.parts import Part, Table, Text, number
from r1p_dist.report.run import RunFiles

EXAMPLES = 3  # answers per task
LONGEST_EXAMPLE = 200  # characters


def following(run: RunFiles) -> list[Part]:
    """Return the share of answers that keep to the form, at three moments; nothing for classification."""
    if not run.metrics.get("instruction_following"):
        return []
    matrix = ScoreMatrix.read(run.metrics, "instruction_following")
    moments = (matrix.zero_shot, matrix.own, matrix.now)
    rows = [[name, *(number(values[i]) for values in moments)] for i, name in enumerate(matrix.tasks)]
    rows.append(["mean", *(number(mean_of(values)) for values in moments)])
    header = ["task", "zero-shot", "after its own training", "last row"]
    return [
        Text("Percent of the answers, right or wrong, that have the form the instruction asks for."),
        Table(header, rows, frozenset({1, 2, 3})),
    ]


def examples(run: RunFiles) -> list[Part]:
    """Return some answers of each task's last evaluation that the matrix has; nothing without answers."""
    latest: dict[str, list[str]] = {}
    for record in sorted(run.answers, key=lambda record: record["row"]):
        if record["row"] <= len(run.matrix.trained):
            latest[record["task"]] = record["answers"]
    rows = []
    for task in run.matrix.tasks:
        texts = latest.get(task, [])
        # Spread over the test set, where samples of one class may stand together.
        rows += [[task, _example(answer)] for answer in texts[:: max(1, len(texts) // EXAMPLES)][:EXAMPLES]]
    return [Table(["task", "answer"], rows)] if rows else []


def _example(answer: str) -> str:
    """Return an answer in quotes on one line, cut where it is long; what cannot be shown becomes U+FFFD."""
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(answer.split()))
    return f"“{line}”" if len(line) <= LONGEST_EXAMPLE else f"“{line[:LONGEST_EXAMPLE]}…”"
