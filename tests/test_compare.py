"""`r1p compare` with a stand-in for `deepspeed` that writes the metrics it is told to."""

import csv
import itertools
import json
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest

from r1p_dist.cli import main
from r1p_dist.compare import output, runs
from r1p_dist.compare.charts import charts
from r1p_dist.compare.settings import read_settings, settings_path
from r1p_dist.evaluation import continual_metrics
from r1p_dist.evaluation.comparison import Result
from r1p_dist.evaluation.paired import NoIntervalError, interval, rank_intervals, read_correct
from r1p_dist.files import lock_file
from r1p_dist.methods import shipped_methods
from r1p_dist.recipes import load_config

ZERO_SHOT = [20.0, 40.0]
DOMAINS = ["seen", "unseen"]
# Rows after task 1 and task 2, by method and seed; joint has one row for both.
ROWS = {
    "zero_shot": {0: [ZERO_SHOT, ZERO_SHOT]},
    "lora": {0: [[60.0, 30.0], [30.0, 70.0]], 1: [[64.0, 26.0], [20.0, 76.0]]},
    "dac": {0: [[50.0, 40.0], [48.0, 60.0]], 1: [[54.0, 38.0], [52.0, 66.0]]},
    "joint": {0: [[70.0, 80.0]], 1: [[74.0, 84.0]]},
}
STAND_IN = """#!{python}
import fcntl, json, os, sys
from pathlib import Path

here = Path({here!r})
overrides = dict(argument.split("=", 1) for argument in sys.argv if "=" in argument)
names = ["OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"]
run_dir = Path(overrides["run_dir"])
lock = run_dir.with_name(f".{{run_dir.name}}.lock")
holds_lock = str(lock) in [os.path.realpath(f"/proc/self/fd/{{number}}") for number in os.listdir("/proc/self/fd")]
is_locked = False
with open(lock, "a") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        is_locked = True
with open(here / "calls.jsonl", "a") as calls:
    call = {{"argv": sys.argv[1:], "environment": {{name: os.environ[name] for name in names}}}}
    call |= {{"is_locked": is_locked, "holds_lock": holds_lock}}
    calls.write(json.dumps(call) + "\\n")
answer = json.loads((here / "answers.json").read_text()).get(run_dir.name)
if answer is None:
    sys.exit("loading ...\\nerror: mini_mtil.yaml: train.lr: -1 is not positive")
run_dir.mkdir(parents=True, exist_ok=True)
for name, text in answer.items():
    (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
    (run_dir / name).write_text(text)
"""


class Bench:
    """A folder with the stand-in on the PATH, what it answers and what it was called with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "compare"
        script = folder / "bin" / "deepspeed"
        script.parent.mkdir()
        script.write_text(STAND_IN.format(python=sys.executable, here=str(folder)))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        self.answers: dict[str, dict[str, str]] = {}

    def answer(self, run: str, metrics: dict[str, Any], **files: str) -> None:
        self.answers[run] = {"metrics.json": json.dumps(metrics), **files}

    def compare(self, *arguments: str) -> int:
        (self.folder / "answers.json").write_text(json.dumps(self.answers))
        return main(["compare", "--output", str(self.output), *arguments])

    def calls(self) -> list[dict[str, Any]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def table_row(self, label: str, table: int = 0) -> list[str]:
        """Cells of the row `label` of the table-th table of comparison.md."""
        tables = (self.output / "comparison.md").read_text().split("| --- |")
        rows = [line.strip("| ").split(" | ") for line in tables[table + 1].splitlines() if line.startswith("| ")]
        return next(row for row in rows if row[0] == label)[1:]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    for name in ("OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    bench = Bench(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for method, seeds in ROWS.items():
        for seed, rows in seeds.items():
            bench.answer(f"{method}-seed{seed}", metrics_of(rows, method))
    return bench


def metrics_of(rows: list[list[float]], method: str, wall_seconds: float = 90.0) -> dict[str, Any]:
    matrix = [ZERO_SHOT, *rows]
    metrics = {"tasks": ["fashion", "flags"], "accuracy": matrix, "domains": DOMAINS, "method": method}
    metrics |= {"world_size": 2}
    before = [None, None] if method == "zero_shot" else [row[task] + 10 for task, row in enumerate(rows)]
    return metrics | {"wall_seconds": wall_seconds, "before_merge": before} | continual_metrics(matrix)


def test_table_against_values_worked_out_by_hand(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.compare("--methods", "zero_shot,lora,joint,dac", "--seeds", "0,1") == 0
    # Transfer 40; Average, Last = mean of (20, 40); zero-shot has one run and no spread.
    assert bench.table_row("zero_shot") == ["40.0", "30.0", "30.0", "20.0", "40.0", "0.00", "–", "1"]
    assert bench.table_row("zero_shot", table=1) == ["–", "30.0", "0.0", "0.0"]
    transfer, average, last, seen, unseen, recovered, rank, seeds = bench.table_row("dac")
    assert transfer == f"39.0 ± {stdev([40, 38]):.1f}"
    # (50 + 40 + 48 + 60) / 4 = 49.5, (54 + 38 + 52 + 66) / 4 = 52.5
    assert average == f"51.0 ± {stdev([49.5, 52.5]):.1f}"
    assert last == f"56.5 ± {stdev([54, 59]):.1f}"
    assert seen == f"50.0 ± {stdev([48, 52]):.1f}"
    assert unseen == f"63.0 ± {stdev([60, 66]):.1f}"
    # (54 - 30) / (75 - 30), (59 - 30) / (79 - 30)
    shares = [24 / 45, 29 / 49]
    assert recovered == f"{sum(shares) / 2:.2f} ± {stdev(shares):.2f}"
    assert (rank, seeds) == ("–", "2")
    # Before the merge 10 more than after it: (50 + 60) / 2, (54 + 66) / 2. What task 1 lost: 50 - 48, 54 - 52.
    spread = f"{stdev([55, 60]):.1f}"
    assert bench.table_row("dac", table=1) == [f"67.5 ± {spread}", f"57.5 ± {spread}", "-2.0 ± 0.0", "2.0 ± 0.0"]
    joint = bench.table_row("joint")
    assert joint[:3] == ["–", "–", f"77.0 ± {stdev([75, 79]):.1f}"] and joint[5] == "1.00 ± 0.00"
    assert bench.table_row("joint", table=1) == ["–"] * 4
    assert (bench.output / "comparison.md").read_text() in capsys.readouterr().out


def test_paired_differences_against_values_worked_out_by_hand(bench: Bench) -> None:
    assert bench.compare("--methods", "zero_shot,lora,dac", "--seeds", "0,1") == 0
    # Transfer: 40 - 30, 38 - 26; Average: 49.5 - 47.5, 52.5 - 46.5; Last: 54 - 50, 59 - 48
    spreads = [f"{stdev(pair):.1f}" for pair in ((10, 12), (2, 6), (4, 11))]
    assert bench.table_row("lora", table=3) == [
        f"+11.0 ± {spreads[0]}",
        "missing",
        f"+4.0 ± {spreads[1]}",
        "missing",
        f"+7.5 ± {spreads[2]}",
        "missing",
        "2",
    ]
    # Zero-shot's one run counts for both seeds: Last 54 - 30, 59 - 30.
    assert bench.table_row("zero_shot", table=3)[4] == f"+26.5 ± {stdev([24, 29]):.1f}"
    assert "lora: no interval, dac-seed0 has no correct.jsonl" in (bench.output / "comparison.md").read_text()
    paired = json.loads((bench.output / "comparison.json").read_text())["paired"]
    assert paired["lora"]["last"] == [4.0, 11.0] and paired["lora"]["seeds"] == [0, 1]


def test_command_and_environment_of_a_run(bench: Bench) -> None:
    settings = bench.folder / "settings.yaml"
    settings.write_text("again: [method=lora, options.restart=true, train.lr=1e-2]\n")
    bench.answer("again-seed4", metrics_of(ROWS["lora"][0], "lora"))
    bench.compare("--methods", "again", "--seeds", "4", "--ranks", "1", "--settings", str(settings), "train.lr=3e-3")
    (call,) = bench.calls()
    argv = call["argv"]
    assert argv[:3] == ["--num_accelerators", "1", "--master_port"]
    # The command line comes after the settings file, so it wins.
    assert argv[4:] == [
        "--no_local_rank",
        "--module",
        "r1p_dist",
        "train",
        "--recipe",
        "mini_mtil",
        "method=lora",
        "options.restart=true",
        "train.lr=1e-2",
        "train.lr=3e-3",
        "seed=4",
        f"run_dir={bench.output / 'again-seed4'}",
    ]
    environment = call["environment"]
    assert environment["MALLOC_TRIM_THRESHOLD_"] == environment["MALLOC_MMAP_THRESHOLD_"] == "4294967296"
    assert int(environment["OMP_NUM_THREADS"]) >= 1


def test_finished_runs_are_not_run_again_and_unfinished_ones_are(bench: Bench) -> None:
    arguments = ("--methods", "lora,dac", "--seeds", "0")
    assert bench.compare(*arguments) == 0
    first = (bench.output / "comparison.md").read_text()
    assert bench.compare(*arguments) == 0
    assert len(bench.calls()) == 2
    assert (bench.output / "comparison.md").read_text() == first

    partial = metrics_of(ROWS["dac"][0][:1], "dac") | {"last": None}
    (bench.output / "dac-seed0" / "metrics.json").write_text(json.dumps(partial))
    assert bench.compare(*arguments) == 0
    assert [call["argv"][-1] for call in bench.calls()[2:]] == [f"run_dir={bench.output / 'dac-seed0'}"]


def test_a_killed_run_is_run_again_even_if_its_metrics_look_complete(bench: Bench) -> None:
    assert bench.compare("--methods", "dac", "--seeds", "0") == 0
    record = bench.output / "dac-seed0.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"finished": False}))
    assert bench.compare("--methods", "dac", "--seeds", "0") == 0
    assert len(bench.calls()) == 2


def test_run_finished_elsewhere_is_used(bench: Bench) -> None:
    folder = bench.output / "dac-seed0"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics_of(ROWS["dac"][1], "dac")))
    assert bench.compare("--methods", "dac", "--seeds", "0") == 0
    assert bench.calls() == []
    assert bench.table_row("dac")[2] == "59.0"


def test_a_run_of_other_ranks_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bench.output / "dac-seed0"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics_of(ROWS["dac"][1], "dac") | {"world_size": 4}))
    assert bench.compare("--methods", "dac", "--seeds", "0") == 1
    assert "made by 4 ranks: --ranks 2 is wrong" in capsys.readouterr().out


def test_finished_run_with_other_settings_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.compare("--methods", "dac", "--seeds", "0", "train.lr=1e-3") == 0
    assert bench.compare("--methods", "dac", "--seeds", "0", "train.lr=2e-3") == 1
    assert "made with other settings" in capsys.readouterr().out
    assert len(bench.calls()) == 1


def test_failed_run_is_shown_and_the_others_are_tabulated(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    del bench.answers["lora-seed1"]
    bench.answers["joint-seed0"] = {}
    assert bench.compare("--methods", "lora,joint,dac", "--seeds", "0,1") == 1
    shown = capsys.readouterr()
    assert "lora-seed1: FAILED: exit code 1" in shown.out
    assert "error: mini_mtil.yaml: train.lr: -1 is not positive" in shown.out
    assert "joint-seed0: FAILED: exit code 0, but" in shown.out
    assert "2 of 6 runs failed" in shown.err
    assert bench.table_row("lora")[2] == "50.0" and bench.table_row("lora")[-1] == "1"
    # Only seed 1 has joint training to compare with: (59 - 30) / (79 - 30).
    assert bench.table_row("dac")[5] == f"{29 / 49:.2f}"
    # Paired: only the seeds that both finished.
    assert bench.table_row("lora", table=3) == ["+10.0", "missing", "+2.0", "missing", "+4.0", "missing", "1"]
    assert "lora-seed1: exit code 1" in (bench.output / "comparison.md").read_text()
    assert set(json.loads((bench.output / "comparison.json").read_text())["failures"]) == {"lora-seed1", "joint-seed0"}


def test_nothing_finished_still_leaves_a_table(bench: Bench) -> None:
    bench.answers = {}
    assert bench.compare("--methods", "lora,dac", "--seeds", "0") == 1
    assert bench.table_row("dac") == ["–"] * 7 + ["0"]
    assert bench.table_row("dac", table=2) == ["–"] * 6


def test_tuning_runs_every_value_on_the_validation_split(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.answer("zero_shot-validation", metrics_of(ROWS["zero_shot"][0], "zero_shot"))
    bench.answer("dac-train.lr=1e-3", metrics_of(ROWS["dac"][0], "dac"))
    bench.answer("dac-train.lr=1e-2", metrics_of(ROWS["dac"][1], "dac"))
    assert bench.compare("--methods", "zero_shot,dac", "--tune", "train.lr=1e-3,1e-2") == 0
    page = (bench.output / "tuning-train.lr.md").read_text()
    assert page in capsys.readouterr().out
    assert page.splitlines()[:5] == [
        "| Method | train.lr | Transfer | Average | Last |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| zero_shot | – | 40.0 | 30.0 | 30.0 |",
        "| dac | 1e-3 | 40.0 | 49.5 | 54.0 |",
        "| dac | 1e-2 | 38.0 | 52.5 | 59.0 |",
    ]
    assert all("data.evaluate_on=validation" in call["argv"] and "seed=0" in call["argv"] for call in bench.calls())
    assert [argument for call in bench.calls() for argument in call["argv"] if argument.startswith("train.lr")] == [
        "train.lr=1e-3",
        "train.lr=1e-2",
    ]


def test_tuning_on_the_test_split_must_be_asked_for_and_is_marked(bench: Bench) -> None:
    bench.answer("dac-train.lr=1e-3", metrics_of(ROWS["dac"][0], "dac"))
    assert bench.compare("--methods", "dac", "--tune", "train.lr=1e-3", "data.evaluate_on=test") == 0
    page = (bench.output / "tuning-train.lr.md").read_text()
    assert "on the test split." in page and "is no measure of it any more" in page
    assert not any("data.evaluate_on=validation" in call["argv"] for call in bench.calls())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=3"], "seed=3: this tool sets seed itself"),
        (["--seeds", "0,one"], "--seeds 0,one: not whole numbers"),
        (["--tune", "train.lr"], "--tune train.lr: has to be KEY=V1,V2,..."),
        (["--settings", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--recipe", "dac_paper"], "compare_dac_paper.yaml: no such file"),
        (["--recipe", "mini_mtil", "train.lr=fast"], "train.lr"),
    ],
)
def test_wrong_input_is_named_before_any_run(
    bench: Bench, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert bench.compare(*arguments) == 2
    assert message in capsys.readouterr().err
    assert bench.calls() == []


@pytest.mark.parametrize("text", ["", "- a\n", "lora: train.lr=1\n", "lora: [train.lr]\n", "lora: [\n"])
def test_malformed_settings_are_refused(bench: Bench, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = bench.folder / "settings.yaml"
    path.write_text(text)
    assert bench.compare("--settings", str(path)) == 2
    assert str(path) in capsys.readouterr().err


def test_shipped_settings_are_valid_configurations_of_their_recipes() -> None:
    expected = {
        "mini_mtil": [
            "zero_shot",
            "lora",
            "lora_restart",
            "joint",
            "dac",
            "steady",
            "steady_inputs",
            "steady_no_anchor",
            "dac_paper",
            "loda",
            "inf_lora",
            "o_lora",
            "n_lora",
            "sd_lora",
            "slao",
            "c_lora",
            "codyra",
            "nusa_cl",
            "lilora",
            "lilora_no_ids",
            "moe_adapters",
            "moe_adapters_no_ids",
            "er",
            "er_weight_2",
            "loda_gamma_1",
            "ewc",
            "full",
            "lwf",
            "wise_ft",
            "zscl",
            "block_lora",
            "so_ra",
            "xgb_lora",
            "ortho_lora",
            "block_lora_together",
            "so_ra_together",
            "xgb_lora_together",
        ],
        "mini_instruct": [
            "zero_shot",
            "blind",
            "lora",
            "dac",
            "lora_no_replay",
            "dac_no_replay",
            "steady_no_replay",
            "steady",
            "joint",
            "er",
            "ewc",
            "slao",
            "o_lora",
            "n_lora",
            "lilora",
            "lilora_no_ids",
        ],
    }
    for recipe, labels in expected.items():
        settings = read_settings(settings_path(recipe))
        assert list(settings) == labels
        for label, overrides in settings.items():
            load_config(recipe, [f"method={label}", *overrides])
    assert "method=lora" in read_settings(settings_path("mini_mtil"))["lora_restart"]


def test_methods_are_by_default_those_of_the_settings_file(bench: Bench) -> None:
    settings = bench.folder / "settings.yaml"
    settings.write_text("dac: []\nlora: []\n")
    assert bench.compare("--settings", str(settings), "--seeds", "0") == 0
    assert [Path(call["argv"][-1]).name for call in bench.calls()] == ["dac-seed0", "lora-seed0"]


def test_all_adds_every_method_that_has_no_label(bench: Bench) -> None:
    settings = bench.folder / "settings.yaml"
    settings.write_text("again: [method=lora, options.restart=true]\ndac: [options.rank=10]\n")
    # wise_ft trains all weights, so it has no rank
    arguments = ("--methods", "all", "--settings", str(settings), "--tabulate", "options.rank=8")
    assert bench.compare(*arguments) == 0
    assert bench.calls() == []
    data = json.loads((bench.output / "comparison.json").read_text())
    labels = ["again", "dac", *(name for name in shipped_methods() if name != "dac")]
    assert list(data["overrides"]) == [label for label in labels if label not in data["left_out"]]
    assert "lora" in data["overrides"] and "steady" in data["overrides"]
    assert "unknown key options.rank of method=wise_ft" in data["left_out"]["wise_ft"]
    page = (bench.output / "comparison.md").read_text()
    assert "Left out:\n\n- " in page and "- wise_ft: command line: unknown key" in page
    assert "Not finished:\n\n- not trained yet: again-seed0, again-seed1, again-seed2, dac-seed0, " in page


def test_tabulating_trains_nothing_and_shows_what_is_finished(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.compare("--methods", "dac", "--seeds", "0") == 0
    assert bench.compare("--methods", "lora,dac", "--seeds", "0,1", "--tabulate") == 0
    assert len(bench.calls()) == 1
    assert "lora-seed0: skipped, not trained yet" in capsys.readouterr().out
    assert bench.table_row("dac")[2] == "54.0" and bench.table_row("lora")[-1] == "0"
    unfinished = json.loads((bench.output / "comparison.json").read_text())["not_finished"]
    assert list(unfinished) == ["lora-seed0", "lora-seed1", "dac-seed1"]


def test_run_that_another_process_trains_is_skipped(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with lock_file(bench.output / ".dac-seed0.lock"):
        assert bench.compare("--methods", "lora,dac", "--seeds", "0") == 0
    assert "dac-seed0: skipped, being trained by another process" in capsys.readouterr().out
    assert (
        "Not finished:\n\n- being trained by another process: dac-seed0\n"
        in (bench.output / "comparison.md").read_text()
    )
    assert bench.table_row("lora")[2] == "50.0" and bench.table_row("dac")[-1] == "0"
    assert bench.compare("--methods", "lora,dac", "--seeds", "0") == 0
    assert bench.table_row("dac")[2] == "54.0"
    # Each held its lock while it trained; the launcher too, which goes on where this process is killed.
    assert [(call["is_locked"], call["holds_lock"]) for call in bench.calls()] == [(True, True)] * 2


def test_run_that_others_look_at_is_not_skipped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run and one that is only tabulated take no lock, which would make the one skip it who is to train."""
    assert bench.compare("--methods", "dac", "--seeds", "0") == 0
    monkeypatch.setattr(runs, "lock_file", lambda *_, **__: pytest.fail("a lock was taken"))
    assert bench.compare("--methods", "lora,dac", "--seeds", "0", "--tabulate") == 0
    assert bench.compare("--methods", "dac", "--seeds", "0") == 0


def test_differences_are_against_the_reference_that_is_named(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--methods", "zero_shot,lora,joint", "--seeds", "0,1")
    assert bench.compare(*arguments) == 0
    # without DAC the first label: Last 30 - 50, 30 - 48 of zero-shot's one run
    assert bench.table_row("lora", table=3)[4] == f"-19.0 ± {stdev([20, 18]):.1f}"
    assert bench.compare(*arguments, "--reference", "lora") == 0
    assert "lora minus the other" in (bench.output / "comparison.md").read_text()
    assert bench.table_row("joint", table=3)[4] == f"-28.0 ± {stdev([25, 31]):.1f}"
    assert json.loads((bench.output / "comparison.json").read_text())["reference"] == "lora"
    capsys.readouterr()
    assert bench.compare(*arguments, "--reference", "dac") == 2
    assert "--reference dac: is not compared; choose one of zero_shot, lora, joint" in capsys.readouterr().err


def test_costs_of_runs(bench: Bench) -> None:
    speeds = {"lora-seed0": [10, None, 40, 20], "dac-seed0": [1, 16, 16], "dac-seed1": [8]}  # medians 20, 16, 8
    for name, values in speeds.items():
        method, seed = name.split("-seed")
        records = [{"loss": 1.0} if speed is None else {"loss": 1.0, "samples_per_second": speed} for speed in values]
        files = {
            "log.jsonl": "".join(json.dumps(record) + "\n" for record in records),
            "adapters/09-flags/adapter.safetensors": "x" * 40_000,
            "adapters/100-fashion/adapter.safetensors": "x" * 1_230_000,
            "adapters/100-fashion/memory.safetensors": "x" * 20_000,
        }
        minutes = {"lora-seed0": 2, "dac-seed0": 1, "dac-seed1": 2}[name]
        metrics = metrics_of(ROWS[method][int(seed)], method, wall_seconds=60.0 * minutes)
        bench.answer(name, metrics | {"trainable_parameters": 12345}, **files)
    bench.answer("lora-seed1", metrics_of(ROWS["lora"][1], "lora", wall_seconds=120.0))
    # What a run says of itself wins: here an option of the method took its router away.
    routed, merged = metrics_of(ROWS["lora"][0], "moe_adapters"), metrics_of(ROWS["lora"][0], "lilora")
    bench.answer("moe_adapters-seed0", routed)
    bench.answer("lilora-seed0", merged | {"inference": "merged"})
    assert bench.compare("--methods", "lora,dac,moe_adapters,lilora", "--seeds", "0,1") == 1  # not all have an answer
    assert bench.table_row("lora", table=2) == ["12,345", "1.23", "0.02", "1.00", "2.0 ± 0.0", "merged weights alone"]
    # 20 / 16; the LoRA of seed 1 has no log
    minutes = f"1.5 ± {stdev([1, 2]):.1f}"
    assert bench.table_row("dac", table=2) == ["12,345", "1.23", "0.02", "1.25", minutes, "merged weights alone"]
    assert bench.table_row("moe_adapters", table=2) == ["–", "–", "–", "–", "1.5", "the task of each sample"]
    assert bench.table_row("lilora", table=2)[-1] == "merged weights alone"
    costs = json.loads((bench.output / "comparison.json").read_text())["costs"]["dac-seed1"]
    assert costs["step_time"] is None and costs["memory_mb"] == 0.02


def test_files_beside_the_page(bench: Bench) -> None:
    arguments = ("--methods", "zero_shot,lora,joint,dac", "--seeds", "0,1", "train.lr=1e-3")
    assert bench.compare(*arguments) == 0
    with open(bench.output / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["seed"]) for row in rows[:3]] == [("zero_shot", "0"), ("lora", "0"), ("lora", "1")]
    assert len(rows) == 7
    dac = rows[-1]
    assert (dac["last"], dac["before_merge"], dac["minutes"], dac["trained"]) == ("59.0", "70.0", "1.5", "")
    assert float(dac["recovered"]) == 29 / 49

    (bench.output / "dac-seed1" / "report.html").write_text("the report of that run")
    assert bench.compare(*arguments, "--tabulate") == 0
    page = (bench.output / "comparison.html").read_text()
    assert '<a href="dac-seed1/report.html">dac, seed 1</a>' in page and "dac, seed 0" in page
    assert page.count('<table class="plain">') == 5 and ">What it costs</h2>" in page and "56.5 ± 3.5" in page
    assert "<li>dac: recipe and <code>options.ago.weight=1.0 train.lr=1e-3</code>" in page
    assert "dac ends highest of 2 methods: Last is 56.5 percent, with zero_shot at 30.0 and joint at 77.0." in page


def test_figures_show_each_seed_and_the_two_lines(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = []
    monkeypatch.setattr(output, "render_page", lambda page: pages.append(page) or "")
    assert bench.compare("--methods", "dac,zero_shot,joint,lora", "--seeds", "0,1") == 0
    (columns,) = pages[0].sections[0].parts
    last, forgetting, *_ = columns.parts
    assert last.layout["yaxis"]["ticktext"] == ["lora", "dac"]  # from below, the best on top
    drawn = {trace["name"]: [*zip(trace["x"], trace["y"], strict=True)] for trace in last.data}
    assert drawn["seeds"] == [(50, 0), (48, 0), (54, 1), (59, 1)]
    assert drawn["mean"] == [(49, 0), (56.5, 1)]
    assert {x for x, _ in drawn["zero-shot"]} == {30.0} and {x for x, _ in drawn["joint training"]} == {77.0}
    assert forgetting.data[-1]["x"][0] == (30 + 44) / 2


def test_costs_that_differ_much_are_drawn_by_their_logarithm() -> None:
    figures = {(name, 0): {"last": 1.0, "forgetting": None} for name in ("small", "large", "free")}
    spent = {"small": 10.0, "large": 5000.0, "free": 0.0}
    costs = {
        (name, 0): {"trained": value, "update_mb": 1.0, "memory_mb": 0.0, "minutes": None}
        for name, value in spent.items()
    }
    (columns,) = charts(figures, costs, "percent")
    by_title = {chart.title: chart for chart in columns.parts}
    assert [*by_title] == ["Last, percent", "Trained numbers", "Update, MB"]  # of the rest nothing is known
    trained = by_title["Trained numbers"]
    assert trained.layout["xaxis"]["type"] == "log" and trained.data[0]["x"] == [10.0, 5000.0]
    assert "type" not in by_title["Update, MB"].layout["xaxis"]


# Instruction tasks

SCORES = {
    "zero_shot": {0: [2.0, 4.0, 6.0, 50.0, 20.0, 30.0]},
    "dac": {0: [40.0, 50.0, 60.0, 70.0, 80.0, 150.0], 1: [44.0, 52.0, 60.0, 70.0, 80.0, 174.0]},
}
TASKS = ["name_object", "read_digit", "read_card", "yes_no", "which_flag", "caption"]
# Of the shipped test splits: one class in 14, 10 and 13, half the questions, the first place 31 times of 126.
MAJORITY = {
    "name_object": 100 / 14,
    "read_digit": 10.0,
    "read_card": 100 / 13,
    "yes_no": 50.0,
    "which_flag": 3100 / 126,
}


@pytest.fixture
def instruct(bench: Bench) -> Bench:
    """The bench with runs of mini_instruct's six tasks, whose last row alone matters."""
    for method, seeds in SCORES.items():
        for seed, row in seeds.items():
            metrics = {"tasks": TASKS, "accuracy": [row] * 7, "method": method}
            bench.answer(f"{method}-seed{seed}", metrics | continual_metrics([row] * 7))
    return bench


def test_every_task_of_instructions_has_its_value_at_the_end(instruct: Bench) -> None:
    assert instruct.compare("--recipe", "mini_instruct", "--methods", "zero_shot,dac", "--seeds", "0,1") == 0
    page = (instruct.output / "comparison.md").read_text()
    assert (
        "| Method | name_object (exact_match) | read_digit (exact_match) | read_card (exact_match) "
        "| yes_no (exact_match) | which_flag (multiple_choice) | caption (cider) | Answers in the form asked for |\n"
    ) in page
    assert "exact_match: percent; multiple_choice: percent; cider: CIDEr x 100, can exceed 100" in page
    assert "Points of each task's metric on the test split, mean ±" in page and "Percent" not in page
    assert instruct.table_row("zero_shot", table=3) == ["2.0", "4.0", "6.0", "50.0", "20.0", "30.0", "–"]
    assert instruct.table_row("dac", table=3) == [
        f"42.0 ± {stdev([40, 44]):.1f}",
        f"51.0 ± {stdev([50, 52]):.1f}",
        *("60.0 ± 0.0", "70.0 ± 0.0", "80.0 ± 0.0"),
        f"162.0 ± {stdev([150, 174]):.1f}",
        "–",
    ]
    tasks = json.loads((instruct.output / "comparison.json").read_text())["tasks"]
    assert tasks["dac-seed1"] == dict(zip(TASKS, SCORES["dac"][1], strict=True))


def test_how_many_answers_have_the_form_asked_for(instruct: Bench) -> None:
    rows = {0: [60.0, 90.0, 100.0, 98.0, 88.0, 100.0], 1: [80.0, 100.0, 100.0, 100.0, 76.0, 99.0]}
    for seed, row in rows.items():
        metrics = json.loads(instruct.answers[f"dac-seed{seed}"]["metrics.json"])
        instruct.answer(f"dac-seed{seed}", metrics | {"instruction_following": [[0.0] * 6, *[[50.0] * 6] * 5, row]})
    arguments = ("--recipe", "mini_instruct", "--methods", "zero_shot,dac")
    assert instruct.compare(*arguments, "--seeds", "0,1") == 0
    # means over tasks of the last rows: 536 / 6, 555 / 6
    assert instruct.table_row("dac", table=3)[-1] == f"90.9 ± {stdev([536 / 6, 555 / 6]):.1f}"
    assert instruct.table_row("zero_shot", table=3)[-1] == instruct.table_row("majority answer", table=3)[-1] == "–"
    spreads = [f"{stdev(pair):.1f}" for pair in zip(*rows.values(), strict=True)]
    means = ["70.0", "95.0", "100.0", "99.0", "82.0", "99.5"]
    expected = [f"{mean} ± {spread}" for mean, spread in zip(means, spreads, strict=True)]
    assert instruct.table_row("dac", table=4) == expected
    assert instruct.table_row("zero_shot", table=4) == ["–"] * 6
    saved = json.loads((instruct.output / "comparison.json").read_text())["instruction_following"]
    assert saved["dac-seed1"] == {"mean": 92.5, "tasks": dict(zip(TASKS, rows[1], strict=True))}
    assert saved["zero_shot-seed0"] == {"mean": None, "tasks": dict.fromkeys(TASKS)}


def test_all_leaves_out_methods_that_the_backbone_has_nothing_for(instruct: Bench) -> None:
    arguments = ("--recipe", "mini_instruct", "--methods", "all", "--seeds", "0", "--tabulate")
    assert instruct.compare(*arguments) == 0
    left_out = json.loads((instruct.output / "comparison.json").read_text())["left_out"]
    assert set(left_out) == {"lwf", "moe_adapters", "zscl"}
    # no path of this machine
    assert left_out["moe_adapters"].startswith(
        "launchers/recipes/mini_instruct.yaml: method=moe_adapters: only for CLIPs"
    )


def test_majority_answers_are_a_row_without_seeds(instruct: Bench) -> None:
    assert instruct.compare("--recipe", "mini_instruct", "--methods", "dac", "--seeds", "0") == 0
    majority = json.loads((instruct.output / "comparison.json").read_text())["majority"]
    values = {task: entry["value"] for task, entry in majority.items()}
    assert {task: values[task] for task in MAJORITY} == pytest.approx(MAJORITY)
    assert majority["yes_no"]["answer"] == "no" and majority["read_card"]["answer"] == "ace"
    assert instruct.table_row("majority answer", table=3) == [*(f"{values[task]:.1f}" for task in TASKS), "–"]
    seen = sum(values[task] for task in ("name_object", "which_flag", "caption")) / 3
    unseen = sum(values[task] for task in ("read_digit", "read_card", "yes_no")) / 3
    assert instruct.table_row("majority answer") == [
        *("–", "–", f"{(seen + unseen) / 2:.1f}", f"{seen:.1f}", f"{unseen:.1f}"),
        *("–", "–", "–"),
    ]


def test_majority_answers_that_cannot_be_had_do_not_stop_the_table(instruct: Bench) -> None:
    stream = instruct.folder / "stream.yaml"
    entries = [
        {"name": task, "train": ["s3://bucket/train.tar"], "test": ["s3://bucket/test.tar"], "metric": "exact_match"}
        for task in TASKS
    ]
    stream.write_text(json.dumps({"name": "remote", "tasks": entries}))
    arguments = ("--methods", "dac", "--seeds", "0", f"stream={stream}")
    assert instruct.compare("--recipe", "mini_instruct", *arguments) == 0
    page = (instruct.output / "comparison.md").read_text()
    assert "- majority answer: missing, s3://bucket/train.tar: majority answers are counted in local shards" in page
    assert instruct.table_row("dac", table=3) == ["40.0", "50.0", "60.0", "70.0", "80.0", "150.0", "–"]


def test_classification_has_neither_majority_answers_nor_a_table_of_tasks(bench: Bench) -> None:
    assert bench.compare("--methods", "dac", "--seeds", "0") == 0
    page = (bench.output / "comparison.md").read_text()
    assert page.count("| --- |") == 3 and "majority" not in page and "Percent on the test split, mean ±" in page
    assert set(json.loads((bench.output / "comparison.json").read_text())) & {"tasks", "majority"} == set()


# Bootstrap over test samples


def correct_jsonl(rows: Sequence[tuple[int, str, str | list[float]]]) -> str:
    return "".join(json.dumps({"row": row, "task": task, "correct": marks}) + "\n" for row, task, marks in rows)


def test_interval_against_the_normal_approximation() -> None:
    generator = np.random.default_rng(1)
    sizes = {"fashion": 400, "flags": 250}
    pairs = [
        tuple({task: generator.integers(2, size=n).astype(float) for task, n in sizes.items()} for _ in range(2))
        for _ in range(3)
    ]
    differences = [np.mean([mine[task] - theirs[task] for mine, theirs in pairs], axis=0) for task in sizes]
    center = 50 * sum(difference.mean() for difference in differences)
    # Standard error of the mean over two tasks of independent means over pictures.
    error = 50 * np.sqrt(sum(difference.var() / len(difference) for difference in differences))
    low, high = interval(pairs)
    assert low == pytest.approx(center - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(center + 1.96 * error, abs=0.1 * error)


def test_interval_of_equal_differences_has_no_width() -> None:
    ones, zeros = {"fashion": np.ones(5), "flags": np.ones(3)}, {"fashion": np.zeros(5), "flags": np.ones(3)}
    assert interval([(ones, zeros)]) == [50.0, 50.0]


def test_interval_is_in_the_table_when_every_run_has_its_answers(bench: Bench) -> None:
    # 2 of 4 and 3 of 4 pictures, both from the last row
    rows = [[50.0, 50.0], [50.0, 75.0]]
    dac = correct_jsonl([(0, "fashion", "0000"), (0, "flags", "0000"), (2, "fashion", "0110"), (2, "flags", "1110")])
    lora = correct_jsonl([(2, "fashion", "0110"), (2, "flags", "0111")])
    bench.answer("dac-seed0", metrics_of(rows, "dac"), **{"correct.jsonl": dac})
    bench.answer("lora-seed0", metrics_of(rows, "lora"), **{"correct.jsonl": lora})
    assert bench.compare("--methods", "lora,dac", "--seeds", "0") == 0
    # fashion is equal throughout. In flags one picture of four is won and one lost: the sum over four drawn ones is at
    # least 3 with probability 9/256 = 3.5 %, 4 with 0.4 %, so the 97.5th percentile is 3/4, half of it in Last.
    intervals = json.loads((bench.output / "comparison.json").read_text())["paired"]["lora"]["intervals"]
    low, high = intervals["last"]
    assert low == -high == -37.5
    cells = bench.table_row("lora", table=3)
    assert cells[5] == "-37.5 to +37.5"
    # the first row is not in the files and is not that of zero-shot, which has none right
    assert (
        cells[1] == cells[3] == "missing"
        and "lora: no interval, correct.jsonl of dac-seed0 does not agree"
        in (bench.output / "comparison.md").read_text()
    )


def test_intervals_of_transfer_and_average_take_the_evaluations_that_the_figures_take(bench: Bench) -> None:
    rows = [["0100", "0000"], ["0110", "1100"], ["0110", "1110"]]  # zero-shot, then two trained tasks
    other = [["0100", "0000"], ["0110", "0000"], ["0110", "1110"]]
    for name, all_marks in (("dac", rows), ("lora", other)):
        lines = [
            (row, task, marks[k]) for row, marks in enumerate(all_marks) for k, task in enumerate(("fashion", "flags"))
        ]
        accuracy = [[25.0 * text.count("1") for text in marks] for marks in all_marks[1:]]
        bench.answer(f"{name}-seed0", metrics_of(accuracy, name), **{"correct.jsonl": correct_jsonl(lines)})
    zero_shot = correct_jsonl([(0, "fashion", "0100"), (0, "flags", "0000")])  # its one row stands for all
    bench.answer("zero_shot-seed0", metrics_of([[25.0, 0.0]] * 2, "zero_shot"), **{"correct.jsonl": zero_shot})
    assert bench.compare("--methods", "zero_shot,lora,dac", "--seeds", "0") == 0
    paired = json.loads((bench.output / "comparison.json").read_text())["paired"]
    # Transfer is of flags after the first task: two pictures of four are won; of four drawn ones, Binomial(4, 1/2),
    # none or all with 6.25 % each.
    assert paired["lora"]["transfer"] == [50.0] and paired["lora"]["intervals"]["transfer"] == [0.0, 100.0]
    # Average: the same in one evaluation of two, of one task of two
    assert paired["lora"]["average"] == [12.5] and paired["lora"]["intervals"]["average"] == [0.0, 25.0]
    assert paired["lora"]["intervals"]["last"] == [0.0, 0.0]
    assert paired["zero_shot"]["intervals"]["transfer"] == [0.0, 100.0]
    assert "no interval" not in (bench.output / "comparison.md").read_text()
    assert bench.table_row("lora", table=3)[:4] == ["+50.0", "+0.0 to +100.0", "+12.5", "+0.0 to +25.0"]


def test_interval_of_graded_scores(tmp_path: Path) -> None:
    def result(name: str, digits: list[float], captions: list[float]) -> Result:
        (tmp_path / name).mkdir()
        lines = correct_jsonl([(0, "caption", [0.0] * 4), (1, "digits", digits), (1, "caption", captions)])
        (tmp_path / name / "correct.jsonl").write_text(lines)
        row = [100 * sum(scores) / len(scores) for scores in (digits, captions)]
        metrics = {"tasks": ["digits", "caption"], "accuracy": [[0.0, 0.0], row], "last": sum(row) / 2}
        return Result(tmp_path / name, metrics)

    dac = read_correct(result("dac", [0.3, 0.9], [1.2, 2.0, 0.4, 1.6]))["last"]
    lora = read_correct(result("lora", [0.1, 0.7], [0.4, 1.2, 0.4, 1.6]))["last"]
    assert isinstance(dac, dict) and isinstance(lora, dict)
    assert dac["caption"].tolist() == [1.2, 2.0, 0.4, 1.6]
    # digits: +0.2 always, 10 points of Last. caption: +0.8 for each drawn of two pictures of four, B of them at
    # Binomial(4, 1/2), P(B = 0) = P(B = 4) = 6.25 %: both bounds are the ends, 0 and 0.8, half of it in Last.
    assert interval([(dac, lora)]) == pytest.approx([10.0, 50.0])


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (None, "dac-seed0 has no correct.jsonl"),
        ([(1, "fashion", "01")], "does not agree with its metrics.json on flags"),
        ([(1, "fashion", "01"), (1, "flags", "10")], "does not agree with its metrics.json on flags"),
    ],
)
def test_answers_that_cannot_be_used_are_said_to_be(
    tmp_path: Path, answers: list[tuple[int, str, str]] | None, reason: str
) -> None:
    folder = tmp_path / "dac-seed0"
    folder.mkdir()
    if answers is not None:
        (folder / "correct.jsonl").write_text(correct_jsonl(answers))
    metrics = {"tasks": ["fashion", "flags"], "accuracy": [[0.0, 0.0], [50.0, 100.0]], "last": 75.0}
    found = read_correct(Result(folder, metrics))["last"]
    assert isinstance(found, NoIntervalError) and reason in str(found)


def test_runs_on_different_pictures_have_no_interval() -> None:
    with pytest.raises(Exception, match="not evaluated on the same samples of fashion"):
        interval([({"fashion": np.ones(3)}, {"fashion": np.ones(4)})])


# Ranks


def test_ranks_against_all_draws_there_are() -> None:
    """Every way to draw two tasks' samples, counted: 3^3 x 4^4 of them, each as likely."""
    marks = {
        "good": ([1.0, 1.0, 0.5], [1.0, 1.0, 0.0, 1.0]),
        "fair": ([1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.5]),
        "poor": ([0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]),
    }
    ranks: dict[str, list[int]] = {label: [] for label in marks}
    for first in itertools.product(range(3), repeat=3):
        for second in itertools.product(range(4), repeat=4):
            last = {
                label: 4 * sum(flags[i] for i in first) + 3 * sum(cards[i] for i in second)  # in whole halves: exact
                for label, (flags, cards) in marks.items()
            }
            for label, value in last.items():
                ranks[label].append(1 + sum(other > value for other in last.values()))
    expected = {}
    for place, (label, drawn) in enumerate(ranks.items(), 1):
        drawn.sort()
        # the ends are sure: half a percent more or less is the same rank
        low, high = ({drawn[int(len(drawn) * (share + off))] for off in (-5e-3, 5e-3)} for share in (0.025, 0.975))
        assert len(low) == len(high) == 1
        expected[label] = [place, low.pop(), high.pop()]
    assert expected["fair"] != expected["poor"]
    # Each seed has a part of it; the mean over seeds counts.
    correct = {
        label: [{"flags": np.array(flags) + shift, "cards": np.array(cards) - shift} for shift in (-0.25, 0.25)]
        for label, (flags, cards) in marks.items()
    }
    assert rank_intervals(correct) == expected


def test_equal_methods_share_the_better_rank() -> None:
    right, wrong = {"flags": np.ones(5)}, {"flags": np.zeros(5)}
    found = rank_intervals({"a": [wrong], "b": [right], "c": [right]})
    assert found == {"a": [3, 3, 3], "b": [1, 1, 1], "c": [1, 1, 1]}


def test_ranks_are_over_the_seeds_that_all_methods_share(bench: Bench) -> None:
    rows = {0: [[50.0, 50.0], [50.0, 75.0]], 1: [[50.0, 50.0], [100.0, 75.0]]}
    answers = {0: ("0110", "1110"), 1: ("1111", "1110")}
    for method, seeds in {"lora": (0, 1), "dac": (0, 1, 2), "zero_shot": (0,)}.items():
        for seed in seeds:
            row = seed % 2 if method == "dac" else 0
            marks = [(2, task, text) for task, text in zip(("fashion", "flags"), answers[row], strict=True)]
            bench.answer(
                f"{method}-seed{seed}", metrics_of(rows[row], method), **{"correct.jsonl": correct_jsonl(marks)}
            )
    assert bench.compare("--methods", "zero_shot,lora,dac,joint", "--seeds", "0,1,2") == 1  # lora-seed2 has no answer
    # DAC is equal on seed 0 and better on seed 1 wherever one of fashion's wrong pictures is drawn: 15 draws of 16.
    assert [bench.table_row(label)[-2] for label in ("zero_shot", "lora", "dac")] == ["2 (1–2)", "2 (1–2)", "1 (1–1)"]
    assert bench.table_row("joint")[-2] == "–"
    page = (bench.output / "comparison.md").read_text()
    assert "Rank by Last over the seeds 0, 1, with 95 %" in page
    assert "- joint: no rank, joint-seed1 has no correct.jsonl" in page
    saved = json.loads((bench.output / "comparison.json").read_text())["ranks_by_last"]
    assert saved["ranks"] == {"zero_shot": [2, 1, 2], "lora": [2, 1, 2], "dac": [1, 1, 1]}
