"""A sweep as one array job: a folder per point, a table, and only what failed is trained again."""

import csv
from pathlib import Path

from tests.slurm.conftest import SLURM
from tests.slurm.runs import Run, ask, submit

pytestmark = SLURM
ALTERNATIVES = ["seed=0,1"]
SHORT = ["tasks=[country_flags]", "train.iterations=2", "train.global_batch_size=8"]
ONE_RANK = ["--profile", "loopback", "--nodes", "1", "--parallel", "2"]


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return {row["point"]: row for row in csv.DictReader(file)}


def test_points_are_trained_and_the_one_that_failed_again(toy: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    failing = folder / "seed=1"
    failing.mkdir(parents=True)
    (failing / "adapters").write_text("stands where a folder should be")
    sweep = [
        "sweep",
        "--recipe",
        "mini_mtil",
        *ALTERNATIVES,
        *SHORT,
        *toy,
        *ONE_RANK,
        "--folder",
        str(folder),
        "--wait",
    ]
    first = submit(*sweep, expect=1)
    assert "2 points, 2 submitted now" in first.stdout
    table = rows(folder)
    assert len(table) == 2 and sum(row["state"] == "finished" for row in table.values()) == 1
    assert table[failing.name]["state"] == "failed" and "adapters" in table[failing.name]["error"]
    assert "error" in first.stdout and "adapters" in first.stdout
    jobs = {Run(folder / name).job for name in table}
    assert len({job.partition("_")[0] for job in jobs}) == 1 and len(jobs) == 2  # one array job
    assert ask("sacct", "--noheader", "--allocations", "--format=State", "--jobs", Run(failing).job) == "FAILED"

    (failing / "adapters").unlink()
    again = submit(*sweep)
    assert "2 points, 1 submitted now" in again.stdout and "best by Last: seed=" in again.stdout
    assert all(row["state"] == "finished" and float(row["last"]) > 0 for row in rows(folder).values())
    assert {Run(folder / name).job for name in table} - jobs == {Run(failing).job}
    assert "Last by seed" in (folder / "report.html").read_text()
