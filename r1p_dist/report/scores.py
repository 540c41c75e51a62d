"""What the evaluations found: the matrix, each task around its merge, what was forgotten when."""

from r1p_dist.evaluation.score_matrix import Row, ScoreMatrix, change_from, mean_of, pad_row
from r1p_dist.page import charts
from r1p_dist.page.parts import Chart, Columns, Heat, HeatCell, Part, Table, number, shortened
from r1p_dist.report.run import RunFiles

DOMAINS = {
    "seen": "the backbone's pretraining has pictures of this kind",
    "unseen": "new to the backbone",
}


def matrix(run: RunFiles) -> list[Part]:
    """Return the matrix, as scores or as changes against zero-shot."""
    found = run.matrix
    rows = [found.zero_shot, *found.trained]
    if all(value is None for row in rows for value in row):
        return []
    changes = [change_from(*pair) for row in found.trained for pair in zip(found.zero_shot, row, strict=True)]
    limit = max([1.0, *(abs(change) for change in changes if change is not None)])
    lines = []
    for r, (moment, row) in enumerate(zip(found.moments, rows, strict=True)):
        cells = [_cell(found, r, c, moment, value, limit) for c, value in enumerate(row)]
        change = change_from(mean_of(found.zero_shot), mean_of(row))
        cells.append(HeatCell(number(mean_of(row)), number(change if r else None, signed=True)))
        lines.append((moment, cells))
    columns = [
        name if metric == "accuracy" else f"{name} ({metric})"
        for name, metric in zip(found.tasks, found.task_metrics, strict=True)
    ]
    caption = (
        f"Results on the {_split(run)} ({'; '.join(dict.fromkeys(found.scales))}); a row per moment of the stream, a "
        "column per task. Colour is the change against the zero-shot row: blue better, red worse. A framed cell is a "
        "task right after its own training; the tasks left of it were trained before, those right of it are still to "
        "come."
    )
    return [Heat(f"{found.quantity} matrix", [*columns, "mean"], lines, (found.quantity, "change"), caption)]


def _split(run: RunFiles) -> str:
    return "validation sets" if run.config.get("data", {}).get("evaluate_on") == "validation" else "test sets"


def _cell(found: ScoreMatrix, row: int, column: int, moment: str, value: float | None, limit: float) -> HeatCell:
    change = change_from(found.zero_shot[column], value) if row else None
    title = f"{found.tasks[column]}, {moment}: {number(value)}"
    if change is not None:
        title += f", zero-shot {number(found.zero_shot[column])}, change {number(change, signed=True)}"
    shade = None if change is None else change / limit
    return HeatCell(number(value), number(change, signed=True), shade, title, found.is_own(row, column))


def tasks(run: RunFiles) -> list[Part]:
    """Return each task around its own merge and at the end of what was trained, and the domains."""
    found, metrics = run.matrix, run.metrics
    if all(value is None for row in [found.zero_shot, *found.trained] for value in row):
        return []
    domains, before = (pad_row(metrics.get(key), len(found.tasks)) for key in ("domains", "before_merge"))
    several = found.quantity != "accuracy"
    rows = [
        [
            name,
            *(number(values[i]) for values in (found.zero_shot, before, found.own, found.now)),
            number(change_from(found.zero_shot[i], found.now[i]), signed=True),
            *([found.task_metrics[i]] if several else []),
        ]
        for i, name in enumerate(found.tasks)
    ]
    header = [
        "task",
        "zero-shot",
        "before merge",
        "after merge",
        "last row",
        "change",
        *(["metric"] if several else []),
    ]
    table = Table(header, rows, frozenset(range(1, 6)), 6, caption="; ".join(dict.fromkeys(found.scales)))
    if all(value is None for value in [*before, *found.own]):
        return [table, *_domains(found, domains)]
    return [Columns([_merges(found, before), table], is_wide=True), *_domains(found, domains)]


def _merges(found: ScoreMatrix, before: Row) -> Chart:
    names = [charts.plain(shortened(name)) for name in found.tasks]
    places = list(range(len(names)))
    traces = [
        charts.line("", [value, own], [y, y], "var(--line)", hoverinfo="skip", showlegend=False)
        for y, (value, own) in enumerate(zip(before, found.own, strict=True))
        if None not in (value, own)
    ]
    looks = [
        ("zero-shot", found.zero_shot, "var(--grey)", "line-ns-open"),
        ("before the merge", before, "var(--orange)", "circle-open"),
        ("after the merge", found.own, "var(--blue)", "circle"),
        ("last row", found.now, "var(--green)", "diamond-open"),
    ]
    for label, values, colour, symbol in looks:
        known = [y for y in places if values[y] is not None]
        if known:
            hover = [f"{names[y]}, {label}: {number(values[y])}" for y in known]
            kept = [values[y] for y in known]
            traces.append(charts.dots(label, kept, known, colour, symbol, text=hover, hoverinfo="text"))
    most = max([100.0, *(value for _, values, _, _ in looks for value in values if value is not None)])
    layout = charts.layout(
        charts.axis(f"{found.quantity} ({found.unit})", range=[-0.02 * most, 1.03 * most]),
        charts.axis(tickvals=places, ticktext=names, range=[len(names) - 0.5, -0.5], showgrid=False),
        showlegend=True,
    )
    title = f"{found.quantity.capitalize()} around each task's merge, and at the end"
    caption = "What a task's training reached, what the merged weight keeps of it, and what later tasks left of that."
    return Chart(title, traces, layout, 110 + 28 * len(names), caption)


def _domains(found: ScoreMatrix, domains: list[str | None]) -> list[Part]:
    rows = []
    for domain, meaning in DOMAINS.items():
        members = [i for i, name in enumerate(domains) if name == domain]
        if members:
            before = mean_of(found.zero_shot[i] for i in members)
            now = mean_of(found.now[i] for i in members)
            change = number(change_from(before, now), signed=True)
            names = ", ".join(found.tasks[i] for i in members)
            rows.append([domain, str(len(members)), number(before), number(now), change, f"{meaning}: {names}"])
    header = ["domain", "tasks", "zero-shot", "last row", "change", ""]
    return [Table(header, rows, frozenset({1, 2, 3, 4}), 5, "Seen and unseen domains")] if rows else []


def forgetting(run: RunFiles) -> list[Part]:
    """Return how the stream went on for what was learnt; nothing before two tasks are, or where all are at once."""
    found = run.matrix
    if len(found.trained) < 2 or found.is_joint:
        return []
    done = len(found.trained)
    seen = [mean_of(row[: i + 1]) for i, row in enumerate(found.trained)]
    coming = [mean_of(row[i + 1 :]) for i, row in enumerate(found.trained)]
    lost = [None, *(_mean_loss(found, i) for i in range(1, done))]
    moments = [charts.plain(shortened(name, 18)) for name in found.tasks[:done]]
    every = max(1, -(-done // 12))
    x = charts.axis("after task", tickvals=list(range(0, done, every)), ticktext=moments[::every], showgrid=False)
    means = [
        ("all tasks", [mean_of(row) for row in found.trained], "var(--blue)"),
        ("tasks trained so far", seen, "var(--green)"),
        ("tasks still to come", coming, "var(--grey)"),
    ]
    table = Table(
        ["after", "all tasks", "trained", "to come", "forgotten"],
        [[found.tasks[i], *(number(values[i]) for _, values, _ in means), number(lost[i])] for i in range(done)],
        frozenset(range(1, 5)),
    )
    hover = [charts.plain(name) for name in found.tasks[:done]]
    lines = [
        charts.line(
            name, range(done), values, colour, text=hover, hovertemplate=f"%{{text}}: %{{y:.1f}}, {name}<extra></extra>"
        )
        for name, values, colour in means
    ]
    layout = charts.layout(x, charts.axis(f"mean {found.quantity} ({found.unit})"), showlegend=True)
    course = Chart("Means over the stream", lines, layout, 320, table=table)
    line = charts.line("forgotten", range(done), lost, "var(--orange)", text=hover)
    line["hovertemplate"] = "%{text}: %{y:.1f} points lost<extra></extra>"
    layout = charts.layout(x, charts.axis("points"))
    caption = "Mean over the tasks trained before of what each has lost since its best moment; below 0 is a gain."
    return [Columns([course, Chart("Forgetting over the stream", [line], layout, 320, caption)])]


def _mean_loss(found: ScoreMatrix, row: int) -> float | None:
    """Return what the tasks before the last of row `row` (from 0) have lost since their best moment, in points."""
    losses = []
    for task in range(row):
        values = [found.trained[i][task] for i in range(task, row)]
        if found.trained[row][task] is None or None in values:
            return None
        losses.append(max(values) - found.trained[row][task])
    return mean_of(losses)
