"""Reports, comparisons, sweeps and `r1p watch` in a real browser: what they show, log and ask for."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from r1p_dist import cli
from r1p_dist.cluster.sweep_table import write_sweep_file, write_sweep_table
from r1p_dist.compare.output import further_files
from r1p_dist.compare.pages import Comparison, Section
from r1p_dist.evaluation.comparison import COLUMNS, Table
from r1p_dist.report.write import write_report
from tests import browser
from tests.test_report import ROWS, log_of, metrics_of, write_run

pytest.importorskip("uvicorn")

from r1p_dist.serve.local import make_server, run_server  # noqa: E402
from r1p_dist.serve.port import listening  # noqa: E402
from r1p_dist.watch.app import make_app  # noqa: E402
from r1p_dist.watch.runs import Watched  # noqa: E402

EVIL = "<img src=x onerror=alert(1)>"


def make_report(folder: Path) -> Path:
    """A run of ten tasks with long names, one of them hostile, its log and its updates."""
    count = 10
    names = [f"task_with_a_long_name_{at}" for at in range(count - 1)] + [EVIL]
    rows = [[10.0 + at + 3 * (row > at) for at in range(count)] for row in range(count + 1)]
    metrics = metrics_of(rows) | {"tasks": names, "before_merge": [30.0] * count, "metric": ["accuracy"] * count}
    log = [{**record, "samples_per_second": 9.0, "data_wait": 0.1, "memory_gb": 2.0} for record in log_of(names)]
    run = write_run(folder, metrics, log)
    (run / "config.yaml").write_text(json.dumps({"stream": "s", "note": EVIL, "long": "x" * 500}))
    for at, name in enumerate(names[:3]):
        there = run / "adapters" / f"{at:02d}-{name}"
        there.mkdir(parents=True)
        ones = {"image.0.q.A": np.ones((2, 4)), "image.0.q.B": np.eye(5)[:, :2], "image.0.q.scaling": np.array(1.0)}
        save_file(ones, there / "adapter.safetensors")
        drift = {"drift": 0.1 * at} if at else {}
        (there / "adapter.json").write_text(json.dumps({"layers": {"image.0.q": drift}}))
    write_report(run)
    return run / "report.html"


def make_single(folder: Path) -> Path:
    write_report(write_run(folder, metrics_of([[20.0], [70.0]], tasks=1, before_merge=[72.0]), log_of(["fashion"])))
    return folder / "report.html"


def make_comparison(folder: Path) -> Path:
    folder.mkdir()
    labels = ["zero_shot", "dac", EVIL]
    keys = [(label, seed) for label in labels for seed in (0, 1)]
    figures = {key: dict.fromkeys(COLUMNS, 10.0 + at) for at, key in enumerate(keys)}
    costs = {
        key: {"trained": 10.0 ** (at + 1), "update_mb": 1.0, "memory_mb": 0.0, "minutes": 2.0}
        for at, key in enumerate(keys)
    }
    costs = {key: own | {"step_time": None, "inference": None} for key, own in costs.items()}
    table = Table(["Method", *COLUMNS.values()], [[label, *["12.3 ± 4.5"] * len(COLUMNS)] for label in labels])
    found = Comparison("percent", figures, costs, [Section("What is learnt", table, "A note.", ["a `point`"])])
    (folder / "comparison.html").write_text(further_files("Comparison", folder, found)["comparison.html"])
    return folder / "comparison.html"


def make_sweep(folder: Path) -> Path:
    folder.mkdir()
    points = {f"lr={lr}": {"lr": lr, "merged": merged} for lr, merged in (("1e-4", "4"), ("1e-2", "8"))}
    write_sweep_file(folder, points, {}, dict.fromkeys(points, "validation"))
    for name in points:
        write_run(folder / name, metrics_of(ROWS))
        (folder / name / "status.json").write_text(json.dumps({"state": "finished"}))
    write_sweep_table(folder)
    return folder / "report.html"


@pytest.mark.parametrize(
    ("make", "charts", "heats"),
    [(make_report, 10, 4), (make_single, 5, 1), (make_comparison, 5, 0), (make_sweep, 3, 0)],
)
def test_pages_are_drawn_at_all_widths_in_both_colours_and_ask_for_nothing(
    tab: browser.Tab, tmp_path: Path, make: Callable[[Path], Path], charts: int, heats: int
) -> None:
    page = make(tmp_path / "run")
    assert page.stat().st_size < 5_000_000
    address = page.as_uri()
    grounds = set()
    for number, (width, dark) in enumerate([(400, False), (2560, True)]):
        if number:
            tab.size(width, dark)
        else:
            tab.open(address, width, dark)
        tab.run("document.querySelectorAll('details').forEach((details) => { details.open = true; }); draw()")
        assert tab.run("document.documentElement.scrollWidth") <= width
        drawn = tab.run(
            "[...document.querySelectorAll('.chart')].map((place) => [place.querySelectorAll('.main-svg').length > 0,"
            " place.querySelector('svg').getBoundingClientRect().width <= place.clientWidth + 1,"
            " place.getAttribute('role') === 'img' && place.getAttribute('aria-label').length > 3])"
        )
        assert drawn == [[True, True, True]] * charts
        assert tab.run("document.querySelectorAll('.heat table').length") == heats
        grounds.add(tab.run("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2  # light and dark
    assert tab.complaints() == [] and tab.requests() == [address]
    assert tab.run("document.querySelectorAll('img[src=x], [onerror]').length") == 0


def test_the_matrix_changes_its_view_by_the_keyboard_and_a_print_is_light(tab: browser.Tab, tmp_path: Path) -> None:
    tab.open(make_report(tmp_path / "run").as_uri(), dark=True)
    shown = "[...document.querySelectorAll('.heat tbody tr:nth-child(2) td:nth-child(2) span')]"
    shown += ".filter((span) => span.offsetParent).map((span) => span.textContent)"
    assert tab.run(shown) == ["13.0"]
    tab.run("document.querySelector('input[type=radio]').focus()")
    tab.press("ArrowRight", 39)
    assert tab.run(shown) == ["+3.0"]
    # every heading below another, each control with a name, each table with heads
    levels = tab.run("[...document.querySelectorAll('h1, h2, h3')].map((head) => Number(head.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert tab.run("[...document.querySelectorAll('table')].every((table) => table.querySelector('th[scope=col]'))")
    assert tab.run("[...document.querySelectorAll('input')].every((input) => input.labels.length === 1)")
    assert tab.run("document.documentElement.lang") == "en"
    colour = "getComputedStyle(document.querySelector('.chart text')).fill"
    assert tab.run(colour) == "rgb(232, 232, 232)"
    tab.run("dispatchEvent(new Event('beforeprint'))")
    assert tab.run(colour) == "rgb(27, 27, 27)"
    tab.run("dispatchEvent(new Event('afterprint'))")
    assert tab.run(colour) == "rgb(232, 232, 232)" and tab.complaints() == []


# r1p watch


@contextmanager
def watched(folder: Path) -> Iterator[tuple[str, threading.Thread]]:
    """Serves a folder, asked four times a second; gives the address and the thread, which ends with the runs."""
    with listening(0) as listener:
        server = make_server(make_app(Watched(folder), lambda: setattr(server, "should_exit", True), refresh_s=0.25))
        thread = threading.Thread(target=run_server, args=(server, listener))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/", thread
        finally:
            server.should_exit = True
            thread.join(60)


def say(run: Path, state: str, **more: object) -> None:
    run.mkdir(exist_ok=True)
    status = {"state": state, "task": "fashion", "step": 10, "steps_left": 50, "process": os.getpid(), **more}
    (run / "status.json").write_text(json.dumps(status | {"host": os.uname().nodename}))


def test_watch_follows_a_run_from_its_start_through_a_resume_to_its_end(tab: browser.Tab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    say(run, "starting", step=None)
    steps = "(document.querySelector('.chart')?.data[0].x.filter((x) => x !== null).join() ?? '')"
    with watched(run) as (address, thread):
        tab.open(address)
        lead = tab.run("document.querySelector('.lead').textContent")
        assert lead.startswith("The run is starting fashion, 50 steps to go. Nothing is learnt yet")
        lines = [json.dumps(record) + "\n" for record in log_of(["fashion"])]
        say(run, "training")
        (run / "log.jsonl").write_text("".join(lines))
        tab.wait(f"{steps} === '10,20,30'")
        tab.run("document.querySelector('details')?.setAttribute('open', '')")
        (run / "log.jsonl").write_text(lines[0] + lines[1][:20])  # a resume cuts it back, and goes on
        tab.wait(f"{steps} === '10'")
        write_run(run, metrics_of([*ROWS[:2], None, None]))
        tab.wait("document.querySelector('.lead').textContent.includes('learnt 1 of 3 tasks')")
        assert thread.is_alive()
        write_run(run, metrics_of(ROWS))
        say(run, "finished")
        tab.wait("document.getElementById('live').textContent === 'the run has ended'")
        tab.wait("document.querySelector('.lead').textContent.startsWith('dac learnt 3 tasks')")
        thread.join(30)
        assert not thread.is_alive()
        assert all(url.startswith(address) for url in tab.requests()) and tab.complaints() == []


def test_watch_lists_the_runs_of_a_folder_and_looks_up_no_other_file(tab: browser.Tab, tmp_path: Path) -> None:
    for name in ("a", EVIL.replace("/", "")):
        say(tmp_path / name, "training")
        write_run(tmp_path / name, metrics_of(ROWS[:3]))
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "metrics.json").write_text(json.dumps(metrics_of(ROWS)))
    with watched(tmp_path) as (address, _):
        tab.open(address, width=400)
        assert tab.run("document.querySelector('.lead').textContent") == "2 of 2 runs go on."
        assert tab.run("document.querySelectorAll('.chart .main-svg').length > 0")
        assert tab.run("document.documentElement.scrollWidth") <= 400
        links = tab.run("[...document.querySelectorAll('td a, th a')].map((link) => link.href)")
        assert len(links) == 2 and tab.complaints() == []
        for link in links:
            tab.open(link)
            assert "learnt 2 of 3 tasks" in tab.run("document.querySelector('.lead').textContent")
            assert tab.run("document.querySelectorAll('a:not([href^=\"#\"])').length") == 0
        for path in ("secret", "a/metrics.json", "..%2f..%2fetc/passwd"):
            assert tab.run(f"fetch('{address}{path}').then((answer) => answer.status)") == 404


def test_a_run_that_is_over_is_only_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say(tmp_path / "good", "finished")
    (tmp_path / "good" / "report.html").write_text("its report")
    assert cli.main(["watch", str(tmp_path / "good"), "--port", "0"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/good: finished; report: {tmp_path}/good/report.html\n"
    say(tmp_path / "bad", "training", process=2**22 + 1)  # no such process
    assert cli.main(["watch", str(tmp_path), "--port", "0"]) == 1
    assert capsys.readouterr().out.splitlines()[0] == f"{tmp_path}/bad: died"
    assert cli.main(["watch", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "empty").mkdir()
    assert cli.main(["watch", str(tmp_path / "empty")]) == 2
    assert "no run in it" in capsys.readouterr().err


def test_a_stopped_job_is_waited_for_and_a_stopped_run_is_over(tmp_path: Path) -> None:
    say(tmp_path, "stopped")
    assert Watched(tmp_path).is_over()
    (tmp_path / "job.json").write_text("{}")
    assert not Watched(tmp_path).is_over()
    say(tmp_path, "finished")
    assert Watched(tmp_path).is_over()
