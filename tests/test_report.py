"""The report page and the accuracy-matrix picture, from run folders written by hand."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from r1p_dist.errors import InputError
from r1p_dist.evaluation import continual_metrics
from r1p_dist.figures import AccuracyRows, curves_figure, matrix_figure, merge_figure
from r1p_dist.report import plot_matrix, write_report

ROWS = [[30.0, 20.0, 10.0], [61.5, 22.25, 9.0], [55.0, 71.0, 12.0], [52.0, 66.0, 80.0]]
VOID_TAGS = {"meta", "img"}


class PageReader(HTMLParser):
    """Collects what a browser would show, which tags are open and what would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.cells: list[list[str]] = []
        self.words: list[str] = []
        self.images: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in {"td", "th"}:
            self.cells[-1].append("")
        for name, value in attrs:
            if tag == "img" and name == "alt":
                self.images.append(str(value))
            if name in {"src", "href"} and not str(value).startswith("data:image/png;base64,"):
                self.references.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open_tags and self.open_tags[-1] in {"td", "th"}:
            self.cells[-1][-1] += data


def metrics_of(rows: list[Any], tasks: int = 3, **more: Any) -> dict[str, Any]:
    names = ["fashion", "flags", "digits"][:tasks]
    metrics = {"tasks": names, "metric": ["accuracy"] * tasks, "accuracy": rows, "before_merge": [], "method": "dac"}
    return metrics | continual_metrics(rows) | more


def write_run(folder: Path, metrics: dict[str, Any], log: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    if log is not None:
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    return folder


def read_page(run_dir: Path) -> PageReader:
    page = PageReader()
    page.feed((run_dir / "report.html").read_text(encoding="utf-8"))
    page.close()
    assert page.open_tags == []
    return page


def log_of(tasks: list[str]) -> list[dict[str, Any]]:
    return [
        {"task": task, "step": step, "loss": 2.0 - step / 40, "ago": 0.1, "lr": 2e-3 * (1 - step / 40)}
        for task in tasks
        for step in (10, 20, 30)
    ]


def test_report_of_a_finished_run_shows_every_part(tmp_path: Path) -> None:
    metrics = metrics_of(
        ROWS,
        before_merge=[70.0, 75.0, 81.0],
        domains=["seen", "seen", "unseen"],
        seed=3,
        world_size=2,
        zero_stage=1,
        trainable_parameters=4978368,
        collectives_per_step={"allreduce": {"calls": 9, "bytes": 250000}, "allgather": {"calls": 3, "bytes": 50000}},
        wall_seconds=90.0,
    )
    run = write_run(tmp_path / "run", metrics, log_of(metrics["tasks"]))
    (run / "config.yaml").write_text("seed: 3\nmethod: dac\n")
    write_report(run)
    page = read_page(run)
    text = " ".join(page.words)
    assert "dac on 3 tasks" in text
    assert "seed 3 · world size 2 · ZeRO stage 1 · 4,978,368 trainable parameters" in text
    assert "12 collectives with 0.30 MB per step · 1.5 minutes" in text
    # Transfer: task 2: 22.25; task 3: (9 + 12) / 2
    assert ["Transfer", "16.4"] in [row[:2] for row in page.cells]
    assert ["Last", "66.0"] in [row[:2] for row in page.cells]
    assert ["Zero-shot", "20.0"] in [row[:2] for row in page.cells]
    assert ["flags", "accuracy", "seen", "20.0", "75.0", "71.0", "66.0", "+46.0"] in page.cells
    assert ["seen", "2", "25.0", "59.0", "+34.0"] in [row[:5] for row in page.cells]
    assert ["unseen", "1", "10.0", "80.0", "+70.0"] in [row[:5] for row in page.cells]
    assert "method: dac" in text and "details" in page.tags
    assert page.images == [
        "accuracy matrix",
        "accuracy before and after each merge",
        "loss and learning rate per task",
    ]


def test_report_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics_of(ROWS, before_merge=[70.0, 75.0, 81.0]), log_of(["fashion"]))
    write_report(run)
    page = read_page(run)
    assert page.references == []
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert "http" not in " ".join(page.words)


def test_every_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    metrics = metrics_of(ROWS, before_merge=[70.0, 75.0, 81.0], domains=[evil] * 3, method=evil)
    metrics |= {"tasks": [evil, "a & $b$", "$"], "metric": [evil] * 3, "seed": evil}
    run = write_run(tmp_path / "run", metrics, log_of(metrics["tasks"]))
    (run / "config.yaml").write_text(f"stream: {evil}\n")
    write_report(run)
    page = read_page(run)
    assert "script" not in page.tags
    assert [evil, evil, evil, "30.0", "70.0", "61.5", "52.0", "+22.0"] in page.cells


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # Nothing trained yet.
        (ROWS[:1], ["flags", "accuracy", "–", "20.0", "–", "–", "–", "–"]),
        # After the first of three tasks, written with and without the rows to come.
        ([*ROWS[:2], None, None], ["flags", "accuracy", "–", "20.0", "–", "–", "22.2", "+2.2"]),
        (ROWS[:3], ["flags", "accuracy", "–", "20.0", "–", "71.0", "71.0", "+51.0"]),
        # Joint training: one row for all tasks.
        ([ROWS[0], ROWS[3]], ["flags", "accuracy", "–", "20.0", "–", "66.0", "66.0", "+46.0"]),
        # Zero-shot as a method.
        ([ROWS[0]] * 4, ["flags", "accuracy", "–", "20.0", "–", "20.0", "20.0", "+0.0"]),
        # Evaluated on some tasks only.
        ([None, [50.0, None, None], None, None], ["flags", "accuracy", "–", "–", "–", "–", "–", "–"]),
    ],
)
def test_report_of_runs_with_undefined_figures(tmp_path: Path, rows: list[Any], expected: list[str]) -> None:
    run = write_run(tmp_path / "run", metrics_of(rows))
    write_report(run)
    assert expected in read_page(run).cells


def test_report_of_a_single_task_and_of_the_least_a_metrics_file_can_hold(tmp_path: Path) -> None:
    single = write_run(tmp_path / "single", metrics_of([[20.0], [70.0]], tasks=1))
    write_report(single)
    assert "dac on 1 task" in " ".join(read_page(single).words)
    least = write_run(tmp_path / "least", {"tasks": [], "accuracy": []})
    write_report(least)
    assert read_page(least).images == []


def test_cut_off_log_line_and_values_that_are_no_number_do_not_stop_the_report(tmp_path: Path) -> None:
    log = log_of(["fashion", "flags"]) + [{"task": "digits", "step": 10, "loss": float("nan"), "lr": None}]
    run = write_run(tmp_path / "run", metrics_of(ROWS), log)
    with open(run / "log.jsonl", "a") as file:
        file.write('{"task": "digits", "st')
    write_report(run)
    assert "loss and learning rate per task" in read_page(run).images


def test_report_is_replaced_whole(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics_of(ROWS[:1]))
    write_report(run)
    write_run(run, metrics_of(ROWS))
    write_report(run)
    assert ["Last", "66.0"] in [row[:2] for row in read_page(run).cells]
    assert sorted(path.name for path in run.iterdir()) == ["metrics.json", "report.html"]


def test_matrix_figure_prints_every_entry_and_frames_own_tasks() -> None:
    axes = matrix_figure(AccuracyRows.read(metrics_of(ROWS))).axes[0]
    printed = [text.get_text() for text in axes.texts]
    expected = [f"{value:.1f}" for row in ROWS for value in [*row, sum(row) / 3]]
    assert printed == expected
    framed = [patch.get_xy() for patch in axes.patches if patch.get_linewidth() > 1]
    assert framed == [(0, 1.35), (1, 2.35), (2, 3.35)]
    assert [label.get_text() for label in axes.get_yticklabels()][1] == "after fashion"


def test_merge_figure_places_points_at_their_accuracies() -> None:
    axes = merge_figure(AccuracyRows.read(metrics_of(ROWS)), [70.0, None, 81.0]).axes[0]
    zero_shot, before, after = (points.get_offsets().tolist() for points in axes.collections)
    assert zero_shot == [[30, 0], [20, 1], [10, 2]]
    assert before == [[70, 0], [81, 2]]
    assert after == [[61.5, 0], [71, 1], [80, 2]]


def test_curves_follow_the_stream_task_after_task() -> None:
    figure = curves_figure(log_of(["fashion", "flags"]))
    assert figure is not None
    loss, ago, lr = figure.axes
    first, second, _ = loss.lines
    assert first.get_xdata().tolist() == [10, 20, 30]
    assert second.get_xdata().tolist() == [40, 50, 60]
    assert second.get_ydata().tolist() == [1.75, 1.5, 1.25]
    assert lr.lines[0].get_ydata().tolist() == pytest.approx([1.5e-3, 1e-3, 5e-4])
    assert [text.get_text() for text in loss.texts] == ["fashion", "flags"]
    assert curves_figure([]) is None


def test_plot_matrix_writes_a_legible_png(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(metrics_of(ROWS)))
    plot_matrix(tmp_path, tmp_path / "pictures" / "matrix.png")
    with Image.open(tmp_path / "pictures" / "matrix.png") as image:
        assert image.format == "PNG" and image.width > 600 and image.height > 300
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["matrix.png"]


def test_folder_without_metrics_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="metrics.json: not found"):
        write_report(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(InputError, match="metrics.json: not valid JSON"):
        write_report(tmp_path)
    (tmp_path / "metrics.json").write_text('{"tasks": ["a"]}')
    with pytest.raises(InputError, match="key accuracy is missing"):
        write_report(tmp_path)
