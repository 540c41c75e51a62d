"""The report page and the accuracy-matrix picture, from run folders written by hand."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from r1p_dist.errors import InputError
from r1p_dist.evaluation import continual_metrics
from r1p_dist.evaluation.score_matrix import ScoreMatrix
from r1p_dist.figures import matrix_figure
from r1p_dist.report.write import plot_matrix, write_report

ROWS = [[30.0, 20.0, 10.0], [61.5, 22.25, 9.0], [55.0, 71.0, 12.0], [52.0, 66.0, 80.0]]
VOID_TAGS = {"meta", "img", "link", "input", "wbr"}


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
        self.charts: dict[str, dict[str, Any]] = {}  # Plotly's data and layout, by title
        self.policy = ""
        self._title, self._is_spec = "", False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in {"td", "th"}:
            self.cells[-1].append("")
        self._is_spec = ("type", "application/json") in attrs
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = str(dict(attrs)["content"])
        for name, value in attrs:
            if tag == "img" and name == "alt":
                self.images.append(str(value))
            if name in {"src", "href"} and not str(value).startswith(("data:", "#")):
                self.references.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open_tags and self.open_tags[-1] in {"script", "style"}:
            if self._is_spec:
                self.charts[self._title] = json.loads(data)
            return
        self.words.append(data)
        if self.open_tags and self.open_tags[-1] == "h3":
            self._title = data.strip()
        if {"td", "th"} & {*self.open_tags} and data.strip():
            self.cells[-1][-1] += data

    def traces(self, title: str) -> dict[str, dict[str, Any]]:
        """The traces of a figure by name."""
        return {trace["name"]: trace for trace in self.charts[title]["data"] if trace["name"]}


def metrics_of(rows: list[Any], tasks: int = 3, **more: Any) -> dict[str, Any]:
    names = ["fashion", "flags", "digits"][:tasks]
    metrics = {"tasks": names, "metric": ["accuracy"] * tasks, "accuracy": rows, "before_merge": [], "method": "dac"}
    return metrics | continual_metrics(rows) | more


def write_run(
    folder: Path,
    metrics: dict[str, Any],
    log: list[dict[str, Any]] | None = None,
    answers: list[dict[str, Any]] | None = None,
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    for name, records in (("log.jsonl", log), ("answers.jsonl", answers)):
        if records is not None:
            (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def read_page(run_dir: Path) -> PageReader:
    page = PageReader()
    page.feed((run_dir / "report.html").read_text(encoding="utf-8"))
    page.close()
    assert page.open_tags == []
    return page


def log_of(tasks: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "step": step,
            "loss": 2.0 - step / 40,
            "loss_data": 1.9 - step / 40,
            "loss_ago": 0.1,
            "lr": 2e-3 * (1 - step / 40),
        }
        for task in tasks
        for step in (10, 20, 30)
    ]


MERGES = "Accuracy around each task's merge, and at the end"


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
        wall_seconds=600.0,
        versions={"torch": "2.x"},
    )
    run = write_run(tmp_path / "run", metrics, log_of(metrics["tasks"]))
    (run / "config.yaml").write_text("seed: 3\nmethod: dac\nstream: /data/birds/stream.yaml\n")
    write_report(run)
    page = read_page(run)
    text = " ".join(page.words)
    assert "dac on 3 tasks" in text
    # before the merge 70, 75, 81; after it 61.5, 71, 80
    assert (
        "dac learnt 3 tasks of birds in 10 minutes: Last is 66.0 percent against 20.0 zero-shot (+46.0); forgetting is "
        "7.2 points; the merge cost 4.5 points per task."
    ) in text
    assert "seed 3 · world size 2 · ZeRO stage 1 · 4,978,368 trainable parameters" in text
    assert "12 collectives with 0.30 MB per step" in text
    # Transfer: task 2: 22.25; task 3: (9 + 12) / 2
    assert ["Transfer", "16.4"] in [row[:2] for row in page.cells]
    assert ["Last", "66.0"] in [row[:2] for row in page.cells]
    assert ["Zero-shot", "20.0"] in [row[:2] for row in page.cells]
    assert ["flags", "20.0", "75.0", "71.0", "66.0", "+46.0"] in page.cells
    assert ["seen", "2", "25.0", "59.0", "+34.0"] in [row[:5] for row in page.cells]
    assert ["unseen", "1", "10.0", "80.0", "+70.0"] in [row[:5] for row in page.cells]
    assert ["torch", "2.x"] in page.cells
    assert "method: dac" in text and "details" in page.tags
    assert [*page.charts] == [
        MERGES,
        "Means over the stream",
        "Forgetting over the stream",
        "Loss",
        "Loss: data",
        "Loss: ago",
        "Learning rate",
    ]


def test_matrix_has_scores_and_changes_and_frames_own_tasks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics_of(ROWS))
    write_report(run)
    cells = read_page(run).cells
    assert ["", "fashion", "flags", "digits", "mean"] in cells
    # each cell holds both of its texts, and the page shows one
    assert ["zero-shot", "30.0–", "20.0–", "10.0–", "20.0–"] in cells
    assert ["after flags", "55.0+25.0", "71.0+51.0", "12.0+2.0", "46.0+26.0"] in cells
    lines = (run / "report.html").read_text().splitlines()
    (row,) = [line for line in lines if 'title="after flags"' in line]
    framed = [part for part in row.split("<td")[1:] if " own" in part.split(">")[0]]
    assert len(framed) == 1 and "flags, after flags: 71.0, zero-shot 20.0, change +51.0" in framed[0]


def test_means_and_forgetting_over_the_stream(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics_of(ROWS))
    write_report(run)
    page = read_page(run)
    means = page.traces("Means over the stream")
    assert means["tasks trained so far"]["y"] == pytest.approx([61.5, (55 + 71) / 2, (52 + 66 + 80) / 3])
    assert means["tasks still to come"]["y"] == [pytest.approx((22.25 + 9) / 2), 12.0, None]
    (lost,) = page.traces("Forgetting over the stream").values()
    # the last is the literature's forgetting
    assert lost["y"] == [None, 6.5, pytest.approx(metrics_of(ROWS)["forgetting"])]


def test_report_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics_of(ROWS, before_merge=[70.0, 75.0, 81.0]), log_of(["fashion"]))
    write_report(run)
    page = read_page(run)
    assert {*page.references} == {"metrics.json", "log.jsonl"}
    assert not page.tags & {"iframe", "object", "base", "form"}
    assert "http" not in " ".join(page.words)
    assert "default-src 'none'" in page.policy and "http" not in page.policy
    assert (run / "report.html").stat().st_size < 5_000_000


def test_every_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    metrics = metrics_of(ROWS, before_merge=[70.0, 75.0, 81.0], domains=[evil] * 3, method=evil)
    metrics |= {"tasks": [evil, "a & $b$", "$"], "metric": [evil] * 3, "seed": evil, "instruction_following": ROWS}
    answers = [{"row": 3, "task": evil, "answers": [evil]}]
    run = write_run(tmp_path / "run", metrics, log_of(metrics["tasks"]), answers)
    (run / "config.yaml").write_text(f"stream: {evil}\n")
    write_report(run)
    page = read_page(run)
    assert evil not in (run / "report.html").read_text()
    assert [evil, "30.0", "70.0", "61.5", "52.0", "+22.0", evil] in page.cells
    assert [evil, "30.0", "61.5", "52.0"] in page.cells
    assert [evil, f"“{evil}”"] in page.cells
    # Plotly reads tags as well
    assert "<" not in json.dumps([chart["data"] for chart in page.charts.values()]).replace("<extra></extra>", "")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # Nothing trained yet.
        (ROWS[:1], ["flags", "20.0", "–", "–", "–", "–"]),
        # After the first of three tasks, written with and without the rows to come.
        ([*ROWS[:2], None, None], ["flags", "20.0", "–", "–", "22.2", "+2.2"]),
        (ROWS[:3], ["flags", "20.0", "–", "71.0", "71.0", "+51.0"]),
        # Joint training: one row for all tasks.
        ([ROWS[0], ROWS[3]], ["flags", "20.0", "–", "66.0", "66.0", "+46.0"]),
        # Zero-shot as a method.
        ([ROWS[0]] * 4, ["flags", "20.0", "–", "20.0", "20.0", "+0.0"]),
        # Evaluated on some tasks only.
        ([None, [50.0, None, None], None, None], ["flags", "–", "–", "–", "–", "–"]),
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
    assert read_page(least).charts == {}


def test_cut_off_log_line_and_values_that_are_no_number_do_not_stop_the_report(tmp_path: Path) -> None:
    log = log_of(["fashion", "flags"]) + [{"task": "digits", "step": 10, "loss": float("nan"), "lr": None}]
    run = write_run(tmp_path / "run", metrics_of(ROWS), log)
    with open(run / "log.jsonl", "a") as file:
        file.write('{"task": "digits", "st')
    write_report(run)
    loss = read_page(run).traces("Loss")["Loss"]
    assert loss["x"] == [10, 20, 30, None, 40, 50, 60, None, 70, None]
    assert loss["y"][4:] == [1.75, 1.5, 1.25, None, None, None]


# Instruction tasks

SCORES = [[5.0, 20.0, 30.0], [60.0, 18.0, 41.5], [55.0, 70.0, 44.5], [50.0, 66.0, 180.0]]
METRICS = ["exact_match", "multiple_choice", "cider"]
FOLLOWING = [[40.0, 0.0, 90.0], [100.0, 2.5, 91.0], [98.0, 99.0, 92.0], [97.0, 98.0, 99.5]]


def answering(rows: list[Any] = SCORES, **more: Any) -> dict[str, Any]:
    evaluated = sum(row is not None for row in rows)
    return metrics_of(rows, metric=METRICS, instruction_following=FOLLOWING[:evaluated], **more)


def test_report_of_instruction_tasks_names_metrics_and_scales_and_never_accuracy(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", answering(before_merge=[70.0, 75.0, 190.0]))
    write_report(run)
    page = read_page(run)
    scales = ["exact_match, percent", "multiple_choice, percent", "cider, CIDEr x 100, can exceed 100"]
    assert ["fashion", "5.0", "70.0", "60.0", "50.0", "+45.0", "exact_match"] in page.cells
    assert ["digits", "30.0", "190.0", "180.0", "180.0", "+150.0", "cider"] in page.cells
    text = " ".join(page.words)
    assert f"Results on the test sets ({'; '.join(scales)})" in text
    assert "accuracy" not in text.lower()
    assert "Score around each task's merge, and at the end" in page.charts
    # CIDEr x 100 is no percentage, so the figures over all tasks are none either.
    assert ["Figure", "points", "Meaning"] in page.cells
    assert ["Last", f"{(50 + 66 + 180) / 3:.1f}"] in [row[:2] for row in page.cells]


def test_instruction_following_at_three_moments(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", answering())
    write_report(run)
    cells = read_page(run).cells
    assert ["fashion", "40.0", "100.0", "97.0"] in cells
    assert ["flags", "0.0", "99.0", "98.0"] in cells
    assert ["digits", "90.0", "99.5", "99.5"] in cells
    assert ["mean", f"{130 / 3:.1f}", f"{298.5 / 3:.1f}", f"{294.5 / 3:.1f}"] in cells


def test_instruction_following_of_joint_training_and_before_any(tmp_path: Path) -> None:
    joint = write_run(tmp_path / "joint", answering([SCORES[0], SCORES[3]]))
    write_report(joint)
    assert ["flags", "0.0", "2.5", "2.5"] in read_page(joint).cells
    begun = write_run(tmp_path / "begun", answering([SCORES[0], None, None, None]))
    write_report(begun)
    assert ["flags", "0.0", "–", "–"] in read_page(begun).cells


def test_examples_are_spread_answers_of_each_tasks_last_row(tmp_path: Path) -> None:
    answers = [
        {"row": 0, "task": "fashion", "answers": ["old"] * 7},
        {"row": 3, "task": "fashion", "answers": [f"a {i}" for i in range(7)]},
        {"row": 3, "task": "flags", "answers": ["", "line\none\x00" + 300 * "x"]},
        # An evaluation that metrics.json does not have yet.
        {"row": 4, "task": "flags", "answers": ["later"]},
    ]
    run = write_run(tmp_path / "run", answering(), answers=answers)
    with open(run / "answers.jsonl", "a") as file:
        file.write('{"row": 3, "task": "digits", "ans')
    write_report(run)
    cells = read_page(run).cells
    first = cells.index(["task", "answer"])
    assert cells[first + 1 : first + 6] == [
        ["fashion", "“a 0”"],
        ["fashion", "“a 2”"],
        ["fashion", "“a 4”"],
        ["flags", "“”"],
        ["flags", "“line one\ufffd" + (200 - 9) * "x" + "…”"],
    ]


def test_metrics_of_before_there_were_instructions_are_accuracies(tmp_path: Path) -> None:
    metrics = metrics_of(ROWS)
    del metrics["metric"]
    run = write_run(tmp_path / "run", metrics)
    write_report(run)
    page = read_page(run)
    assert ["flags", "20.0", "–", "71.0", "66.0", "+46.0"] in page.cells
    assert ["Figure", "percent", "Meaning"] in page.cells
    text = " ".join(page.words)
    assert "Instruction following" not in text and "Example answers" not in text


def test_figures_have_room_for_values_over_100(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", answering(before_merge=[70.0, 75.0, 190.0]))
    write_report(run)
    chart = read_page(run).charts["Score around each task's merge, and at the end"]
    low, high = chart["layout"]["xaxis"]["range"]
    assert low < 0 and high > 190
    assert chart["layout"]["xaxis"]["title"]["text"] == "score (points)"
    axes = matrix_figure(ScoreMatrix.read(answering())).axes[0]
    assert "180.0" in [text.get_text() for text in axes.texts]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["fashion (exact_match)", "flags (multiple_choice)", "digits (cider)", "mean"]


def test_merge_figure_places_points_at_their_accuracies(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics_of(ROWS, before_merge=[70.0, None, 81.0]))
    write_report(run)
    page = read_page(run)
    found = {name: [*zip(trace["x"], trace["y"], strict=True)] for name, trace in page.traces(MERGES).items()}
    assert found == {
        "zero-shot": [(30, 0), (20, 1), (10, 2)],
        "before the merge": [(70, 0), (81, 2)],
        "after the merge": [(61.5, 0), (71, 1), (80, 2)],
        "last row": [(52, 0), (66, 1), (80, 2)],
    }
    layout = page.charts[MERGES]["layout"]
    assert layout["xaxis"]["range"] == [-2, 103] and layout["yaxis"]["ticktext"] == ["fashion", "flags", "digits"]


def test_curves_follow_the_stream_task_after_task(tmp_path: Path) -> None:
    log = [{**record, "memory_gb": 1.5, "samples_per_second": 8.0} for record in log_of(["fashion", "flags"])]
    run = write_run(tmp_path / "run", metrics_of(ROWS), log)
    write_report(run)
    page = read_page(run)
    loss = page.traces("Loss")["Loss"]
    assert loss["x"] == [10, 20, 30, None, 40, 50, 60, None]
    assert loss["y"] == [1.75, 1.5, 1.25, None, 1.75, 1.5, 1.25, None]
    assert loss["text"][4] == "flags, step 10"
    assert [shape["x0"] for shape in page.charts["Loss"]["layout"]["shapes"]] == [30]
    assert page.traces("Learning rate")["Learning rate"]["y"][:3] == pytest.approx([1.5e-3, 1e-3, 5e-4])
    assert page.traces("Memory")["Memory"]["y"][0] == 1.5
    assert ["fashion", "30", "1.25", "1.15", "0.1", "8", "1.5"] in page.cells


def test_a_long_log_is_thinned_to_what_a_screen_shows(tmp_path: Path) -> None:
    log = [{"task": "fashion", "step": step, "loss": 1.0} for step in range(1, 10_001)]
    run = write_run(tmp_path / "run", metrics_of(ROWS[:2]), log)
    write_report(run)
    steps = read_page(run).traces("Loss")["Loss"]["x"]
    assert len(steps) < 1600 and steps[0] == 1 and steps[-2] == 10_000


def test_report_is_replaced_whole(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics_of(ROWS[:1]))
    write_report(run)
    write_run(run, metrics_of(ROWS))
    write_report(run)
    assert ["Last", "66.0"] in [row[:2] for row in read_page(run).cells]
    assert sorted(path.name for path in run.iterdir()) == ["metrics.json", "report.html"]


def test_matrix_figure_prints_every_entry_and_frames_own_tasks() -> None:
    axes = matrix_figure(ScoreMatrix.read(metrics_of(ROWS))).axes[0]
    printed = [text.get_text() for text in axes.texts]
    expected = [f"{value:.1f}" for row in ROWS for value in [*row, sum(row) / 3]]
    assert printed == expected
    framed = [patch.get_xy() for patch in axes.patches if patch.get_linewidth() > 1]
    assert framed == [(0, 1.35), (1, 2.35), (2, 3.35)]
    assert [label.get_text() for label in axes.get_yticklabels()][1] == "after fashion"


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
