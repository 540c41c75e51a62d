"""How training went: what log.jsonl has, one task after another."""

from itertools import accumulate, groupby

from r1p_dist.page import charts
from r1p_dist.page.parts import Chart, Columns, Part, Table
from r1p_dist.report.run import Records, RunFiles

_KNOWN = {
    "lr": ("Learning rate", "", "var(--orange)"),
    "samples_per_second": ("Samples per second", "", "var(--blue)"),
    "data_wait": ("Waiting for data", "share of the time", "var(--purple)"),
    "memory_gb": ("Memory", "GB, rank 0 at its peak", "var(--red)"),
}


def curves(run: RunFiles) -> list[Part]:
    """Return a figure for the loss, each of its terms, and all else that the log has numbers of."""
    log = [record for record in run.log if "task" in record and charts.is_finite(record.get("step"))]
    if not log:
        return []
    # a task's steps count from 1; those of the stream go on
    parts_of_log = [(str(task), list(records)) for task, records in groupby(log, lambda record: record["task"])]
    starts = [0, *accumulate(max(record["step"] for record in records) for _, records in parts_of_log)]
    terms = dict.fromkeys(key for record in log for key in record if key.startswith("loss_"))
    looks = {"loss": ("Loss", "", "var(--blue)")}
    looks |= {key: (f"Loss: {key.removeprefix('loss_')}", "", "var(--green)") for key in terms}
    found = []
    for key, (title, unit, colour) in (looks | _KNOWN).items():
        if any(charts.is_finite(record.get(key)) for record in log):
            found.append(_chart(key, title, unit, colour, parts_of_log, starts))
    return [Columns(found), _table(parts_of_log, [key for key in looks | _KNOWN if key != "lr"])] if found else []


def _chart(
    key: str, title: str, unit: str, colour: str, parts_of_log: list[tuple[str, Records]], starts: list[int]
) -> Chart:
    x, y, hover = [], [], []
    for (task, records), start in zip(parts_of_log, starts, strict=False):
        for record in charts.thinned(records):
            value = record.get(key)
            x.append(start + record["step"])
            y.append(value if charts.is_finite(value) else None)
            hover.append(f"{charts.plain(task)}, step {record['step']}")
        # between two tasks the line is broken
        x.append(None)
        y.append(None)
        hover.append("")
    line = charts.line(title, x, y, colour, text=hover, hovertemplate="%{text}: %{y:.4g}<extra></extra>")
    if all(len(records) < 3 for _, records in parts_of_log):
        line["mode"] = "lines+markers"
    bounds = [
        {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
        | {"line": {"color": "var(--line)", "width": 1, "dash": "dot"}}
        for at in starts[1:-1]
    ]
    shape = {"rangemode": "tozero"} if key in ("samples_per_second", "data_wait", "memory_gb") else {}
    layout = charts.layout(
        charts.axis("optimizer step of the stream", range=[0, max(starts[-1], 1)], showgrid=False),
        charts.axis(unit, exponentformat="power", **shape),
        shapes=bounds,
    )
    return Chart(title, [line], layout, 230)


def _table(parts_of_log: list[tuple[str, Records]], keys: list[str]) -> Table:
    """Return what the last logged step of each task says, and the means of what is no loss."""
    keys = [key for key in keys if any(charts.is_finite(r.get(key)) for _, records in parts_of_log for r in records)]
    rows = []
    for task, records in parts_of_log:
        row = [task, f"{max(record['step'] for record in records):,}"]
        for key in keys:
            values = [record[key] for record in records if charts.is_finite(record.get(key))]
            value = None if not values else values[-1] if key.startswith("loss") else sum(values) / len(values)
            row.append("–" if value is None else f"{value:.4g}")
        rows.append(row)
    names = {"loss": "loss, at the end", "samples_per_second": "samples/s", "data_wait": "data wait", "memory_gb": "GB"}
    header = ["task", "steps", *(names.get(key, key.removeprefix("loss_")) for key in keys)]
    return Table(header, rows, frozenset(range(1, len(header))), caption="Per task; a dotted line is where one begins")
