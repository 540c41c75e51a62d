"""`r1p compare` with a stand-in for `deepspeed` that writes the metrics it is told to."""

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
from r1p_dist.compare.settings import read_settings, settings_path
from r1p_dist.evaluation import continual_metrics
from r1p_dist.evaluation.comparison import Result, last_interval, read_correct
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
import json, os, sys
from pathlib import Path

here = Path({here!r})
overrides = dict(argument.split("=", 1) for argument in sys.argv if "=" in argument)
names = ["OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"]
with open(here / "calls.jsonl", "a") as calls:
    call = {{"argv": sys.argv[1:], "environment": {{name: os.environ[name] for name in names}}}}
    calls.write(json.dumps(call) + "\\n")
run_dir = Path(overrides["run_dir"])
answer = json.loads((here / "answers.json").read_text()).get(run_dir.name)
if answer is None:
    sys.exit("loading ...\\nerror: mini_mtil.yaml: train.lr: -1 is not positive")
run_dir.mkdir(parents=True, exist_ok=True)
for name, text in answer.items():
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
    return metrics | {"wall_seconds": wall_seconds} | continual_metrics(matrix)


def test_table_against_values_worked_out_by_hand(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.compare("--methods", "zero_shot,lora,joint,dac", "--seeds", "0,1") == 0
    # Transfer 40; Average, Last = mean of (20, 40); zero-shot has one run and no spread.
    zero_shot = ["40.0", "30.0", "30.0", "20.0", "40.0", "30.0", "0.0", "0.00", "1.5", "1"]
    assert bench.table_row("zero_shot") == zero_shot
    transfer, average, last, seen, unseen, own, forgetting, recovered, minutes, seeds = bench.table_row("dac")
    assert transfer == f"39.0 ± {stdev([40, 38]):.1f}"
    # (50 + 40 + 48 + 60) / 4 = 49.5, (54 + 38 + 52 + 66) / 4 = 52.5
    assert average == f"51.0 ± {stdev([49.5, 52.5]):.1f}"
    assert last == f"56.5 ± {stdev([54, 59]):.1f}"
    assert seen == f"50.0 ± {stdev([48, 52]):.1f}"
    assert unseen == f"63.0 ± {stdev([60, 66]):.1f}"
    # (50 + 60) / 2, (54 + 66) / 2
    assert own == f"57.5 ± {stdev([55, 60]):.1f}"
    assert forgetting == "2.0 ± 0.0"
    # (54 - 30) / (75 - 30), (59 - 30) / (79 - 30)
    shares = [24 / 45, 29 / 49]
    assert recovered == f"{sum(shares) / 2:.2f} ± {stdev(shares):.2f}"
    assert (minutes, seeds) == ("1.5 ± 0.0", "2")
    joint = bench.table_row("joint")
    assert joint[:3] == ["–", "–", f"77.0 ± {stdev([75, 79]):.1f}"]
    assert joint[5:8] == ["–", "–", "1.00 ± 0.00"]
    assert (bench.output / "comparison.md").read_text() in capsys.readouterr().out


def test_paired_differences_against_values_worked_out_by_hand(bench: Bench) -> None:
    assert bench.compare("--methods", "zero_shot,lora,dac", "--seeds", "0,1") == 0
    # Transfer: 40 - 30, 38 - 26; Average: 49.5 - 47.5, 52.5 - 46.5; Last: 54 - 50, 59 - 48
    spreads = [f"{stdev(pair):.1f}" for pair in ((10, 12), (2, 6), (4, 11))]
    assert bench.table_row("lora", table=1) == [
        f"+11.0 ± {spreads[0]}",
        f"+4.0 ± {spreads[1]}",
        f"+7.5 ± {spreads[2]}",
        "missing",
        "2",
    ]
    # Zero-shot's one run counts for both seeds: Last 54 - 30, 59 - 30.
    assert bench.table_row("zero_shot", table=1)[2] == f"+26.5 ± {stdev([24, 29]):.1f}"
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
    assert bench.table_row("dac")[7] == f"{29 / 49:.2f}"
    # Paired: only the seeds that both finished.
    assert bench.table_row("lora", table=1) == ["+10.0", "+2.0", "+4.0", "missing", "1"]
    assert "lora-seed1: exit code 1" in (bench.output / "comparison.md").read_text()
    assert set(json.loads((bench.output / "comparison.json").read_text())["failures"]) == {"lora-seed1", "joint-seed0"}


def test_nothing_finished_still_leaves_a_table(bench: Bench) -> None:
    bench.answers = {}
    assert bench.compare("--methods", "lora,dac", "--seeds", "0") == 1
    assert bench.table_row("dac") == ["–"] * 9 + ["0"]


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
        "mini_mtil": ["zero_shot", "lora", "lora_restart", "joint", "dac", "steady"],
        "mini_instruct": ["zero_shot", "blind", "lora", "dac", "lora_no_replay", "dac_no_replay", "joint"],
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
        "| yes_no (exact_match) | which_flag (multiple_choice) | caption (cider) |\n"
    ) in page
    assert "exact_match: percent; multiple_choice: percent; cider: CIDEr x 100, can exceed 100" in page
    assert "Points of each task's metric on the test split, mean ±" in page and "Percent" not in page
    assert instruct.table_row("zero_shot", table=1) == ["2.0", "4.0", "6.0", "50.0", "20.0", "30.0"]
    assert instruct.table_row("dac", table=1) == [
        f"42.0 ± {stdev([40, 44]):.1f}",
        f"51.0 ± {stdev([50, 52]):.1f}",
        *("60.0 ± 0.0", "70.0 ± 0.0", "80.0 ± 0.0"),
        f"162.0 ± {stdev([150, 174]):.1f}",
    ]
    tasks = json.loads((instruct.output / "comparison.json").read_text())["tasks"]
    assert tasks["dac-seed1"] == dict(zip(TASKS, SCORES["dac"][1], strict=True))


def test_majority_answers_are_a_row_without_seeds(instruct: Bench) -> None:
    assert instruct.compare("--recipe", "mini_instruct", "--methods", "dac", "--seeds", "0") == 0
    majority = json.loads((instruct.output / "comparison.json").read_text())["majority"]
    values = {task: entry["value"] for task, entry in majority.items()}
    assert {task: values[task] for task in MAJORITY} == pytest.approx(MAJORITY)
    assert majority["yes_no"]["answer"] == "no" and majority["read_card"]["answer"] == "ace"
    assert instruct.table_row("majority answer", table=1) == [f"{values[task]:.1f}" for task in TASKS]
    seen = sum(values[task] for task in ("name_object", "which_flag", "caption")) / 3
    unseen = sum(values[task] for task in ("read_digit", "read_card", "yes_no")) / 3
    assert instruct.table_row("majority answer") == [
        *("–", "–", f"{(seen + unseen) / 2:.1f}", f"{seen:.1f}", f"{unseen:.1f}"),
        *("–", "–", "–", "–", "–"),
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
    assert instruct.table_row("dac", table=1) == ["40.0", "50.0", "60.0", "70.0", "80.0", "150.0"]


def test_classification_has_neither_majority_answers_nor_a_table_of_tasks(bench: Bench) -> None:
    assert bench.compare("--methods", "dac", "--seeds", "0") == 0
    page = (bench.output / "comparison.md").read_text()
    assert page.count("| --- |") == 1 and "majority" not in page and "Percent on the test split, mean ±" in page
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
    low, high = last_interval(pairs)
    assert low == pytest.approx(center - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(center + 1.96 * error, abs=0.1 * error)


def test_interval_of_equal_differences_has_no_width() -> None:
    ones, zeros = {"fashion": np.ones(5), "flags": np.ones(3)}, {"fashion": np.zeros(5), "flags": np.ones(3)}
    assert last_interval([(ones, zeros)]) == [50.0, 50.0]


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
    low, high = json.loads((bench.output / "comparison.json").read_text())["paired"]["lora"]["interval"]
    assert low == -high == -37.5
    assert bench.table_row("lora", table=1)[3] == "-37.5 to +37.5"


def test_interval_of_graded_scores(tmp_path: Path) -> None:
    def result(name: str, digits: list[float], captions: list[float]) -> Result:
        (tmp_path / name).mkdir()
        lines = correct_jsonl([(0, "caption", [0.0] * 4), (1, "digits", digits), (1, "caption", captions)])
        (tmp_path / name / "correct.jsonl").write_text(lines)
        row = [100 * sum(scores) / len(scores) for scores in (digits, captions)]
        return Result(tmp_path / name, {"tasks": ["digits", "caption"], "accuracy": [[0.0, 0.0], row]})

    dac = read_correct(result("dac", [0.3, 0.9], [1.2, 2.0, 0.4, 1.6]))
    lora = read_correct(result("lora", [0.1, 0.7], [0.4, 1.2, 0.4, 1.6]))
    assert dac["caption"].tolist() == [1.2, 2.0, 0.4, 1.6]
    # digits: +0.2 always, 10 points of Last. caption: +0.8 for each drawn of two pictures of four, B of them at
    # Binomial(4, 1/2), P(B = 0) = P(B = 4) = 6.25 %: both bounds are the ends, 0 and 0.8, half of it in Last.
    assert last_interval([(dac, lora)]) == pytest.approx([10.0, 50.0])


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
    with pytest.raises(Exception, match=reason):
        read_correct(Result(folder, {"tasks": ["fashion", "flags"], "accuracy": [[50.0, 100.0]]}))


def test_runs_on_different_pictures_have_no_interval() -> None:
    with pytest.raises(Exception, match="not evaluated on the same samples of fashion"):
        last_interval([({"fashion": np.ones(3)}, {"fashion": np.ones(4)})])
