"""What is handed to a cluster, without one: the script, environment, and how runs of the past are described."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1p_dist.cli import run_command
from r1p_dist.cluster.job import TrainJob
from r1p_dist.cluster.runs import describe_runs, find_runs, last_error
from r1p_dist.cluster.scheduler import JobRecord
from r1p_dist.cluster.submission import _outside_of_jobs, _start_again_after_a_crash
from r1p_dist.cluster.sweep_table import write_sweep_file, write_sweep_table
from r1p_dist.recipes import load_config
from r1p_dist.rendezvous import export_rendezvous, port_of


def submit(capsys, *words: str) -> tuple[int, str, str]:
    code = run_command("submit", list(words))
    return code, *capsys.readouterr()


def test_a_dry_run_prints_the_script_and_does_nothing(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")  # needs no SLURM
    flags = "--nodes 2 --gpus-per-node 8 --cpus-per-task 6 --partition gpu --time 1-0 --slurm qos=high --slurm=hold"
    words = ["--recipe", "mini_mtil", *flags.split(), "--slurm", "reservation=r1", "--dry-run", f"run_dir={tmp_path}/a"]
    code, script, _ = submit(capsys, *words)
    assert code == 0 and list(tmp_path.iterdir()) == []
    for option in (
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "cpus-per-task=6",
        "partition=gpu",
        "time=1440",
        "qos=high",
        "reservation=r1",
        "signal=USR2@300",
    ):
        assert f"#SBATCH --{option}\n" in script
    assert "#SBATCH --hold\n" in script
    assert f"--output {tmp_path}/a/jobs/%j_%t_log.out --wait=120 --cpus-per-task=6" in script
    assert subprocess.run(["/bin/bash", "-n"], input=script, text=True).returncode == 0


def test_a_profiles_lines_are_in_the_script(tmp_path: Path, capsys) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        "setup: ['module load cuda']\nsrun_args: ['--container-image=/a b.sqsh']\npython: singularity exec x python\n"
    )
    words = ["--recipe", "mini_mtil", "--profile", str(profile), "--parallel", "2", "--dry-run"]
    code, script, _ = submit(capsys, "sweep", *words, "seed=0,1,2", "--folder", str(tmp_path / "s"))
    assert code == 0 and "\nmodule load cuda\n" in script and "#SBATCH --array=0-2%2\n" in script
    assert "'--container-image=/a b.sqsh' singularity exec x python -u -m submitit" in script


@pytest.mark.parametrize(
    ("words", "reasons"),
    [
        (["--recipe", "nowhere"], ["recipe 'nowhere'"]),
        (["--recipe", "mini_mtil", "--nodes", "5"], ["train.global_batch_size=32", "5 ranks"]),
        (["--recipe", "mini_mtil", "--node", "x"], ["--node"]),
        (["--recipe", "mini_mtil", "--nodez", "2"], ["--nodez"]),
        (["sweep", "--recipe", "mini_mtil", "seed=1"], ["several values"]),
        (["sweep", "--recipe", "mini_mtil", "seed=1,2", "--parallel", "0"], ["--parallel 0"]),
        (["sweep", "--recipe", "mini_mtil", "method=lora", "options.rank=0,-1"], ["none of the 2 points"]),
        (["sweep", "--recipe", "mini_mtil", "--cluster", "debug", "seed=1,2"], ["cluster=debug"]),
        (["status", "nowhere"], ["nowhere"]),
        (["logs", "nowhere"], ["no job was submitted"]),
        (["cancel", "nowhere"], ["no job was submitted"]),
    ],
)
def test_wrong_input_is_one_line_and_code_2(tmp_path: Path, capsys, monkeypatch, words: list[str], reasons) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = submit(capsys, *words)
    assert code == 2 and len(error.splitlines()) == 1 and all(reason in error for reason in reasons)


def test_without_slurm_the_remedy_is_named(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    code, _, error = submit(capsys, "--recipe", "mini_mtil", f"run_dir={tmp_path}/a")
    assert code == 2 and len(error.splitlines()) == 1 and "srun" in error


@pytest.mark.parametrize(
    ("code", "starts_again"), [(0, False), (1, True), (2, False), (75, False), (76, True), (255, False)]
)
def test_a_crash_starts_the_job_again_but_not_for_ever(tmp_path: Path, code: int, starts_again: bool) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    lines = "\n".join([f"(exit {code})", *_start_again_after_a_crash(2, tmp_path)])
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "9"}
    environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    for _ in range(4):
        assert subprocess.run(["bash", "-c", lines], env=environment, stdout=subprocess.DEVNULL).returncode == code
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert asked == "requeue 7_3\n" * 2 * starts_again


def test_a_port_is_one_jobs_and_one_starts() -> None:
    ports = {port_of(str(job), "0", str(restart)) for job in range(100) for restart in range(5)}
    assert len(ports) > 480 and all(12000 <= port < 32000 for port in ports)


def test_ranks_under_srun_find_each_other(monkeypatch) -> None:
    slurm = {"JOB_ID": "12", "NTASKS": "4", "JOB_NUM_NODES": "2", "NODEID": "1", "PROCID": "3", "LOCALID": "1"}
    slurm |= {"JOB_NODELIST": "node[07-08]", "STEP_NUM_TASKS": "4", "STEP_ID": "0", "RESTART_COUNT": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in (*names, "SUBMITIT_EXECUTOR"):
        monkeypatch.setenv(name, "")  # so that it is taken back
        monkeypatch.delenv(name)
    export_rendezvous()
    assert [os.environ[name] for name in names] == ["3", "4", "1", "2", "2", "node07", str(port_of("12", "0", "1"))]


def test_a_job_submitted_from_a_job_does_not_take_that_for_its_own(monkeypatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/somewhere")
    with _outside_of_jobs():
        assert not {"SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "RANK"} & os.environ.keys()
        assert os.environ["SLURM_CONF"] == "/somewhere"
    assert os.environ["SLURM_JOB_ID"] == "1"


def test_a_job_that_is_queued_again_starts_the_same() -> None:
    job = TrainJob(Path("a.yaml"))
    again = job.checkpoint()
    assert again.function is job and job.config_file == Path("a.yaml").absolute()


def make_run(folder: Path, **status: object) -> Path:
    folder.mkdir(parents=True)
    whole = {"state": "training", "task": "cars", "step": 4, "steps_left": 60, "host": os.uname().nodename}
    (folder / "status.json").write_text(json.dumps(whole | {"process": os.getpid()} | status))
    (folder / "config.yaml").write_text("method: dac\ntrain: {global_batch_size: 32}\n")
    (folder / "log.jsonl").write_text('{"samples_per_second": 16.0}\n{"samples_per_sec')
    return folder


def test_runs_are_described_by_their_own_files(tmp_path: Path, capsys) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "sweep" / "b", process=2**22 + 1)
    make_run(tmp_path / "c", state="finished", process=2**22 + 1)
    runs = describe_runs(find_runs([tmp_path]))
    assert [run.run_dir.name for run in runs] == ["a", "c", "b"]
    assert [run.state for run in runs] == ["training", "finished", "died"]
    assert [run.seconds_left for run in runs] == [120.0, None, None]  # 60 steps of 32 at 16 per second
    code, table, _ = submit(capsys, "status", str(tmp_path))
    assert code == 0 and len(table.splitlines()) == 4 and "0:02" in table.splitlines()[1]


def test_the_last_line_with_an_error_is_found(tmp_path: Path) -> None:
    record = JobRecord("slurm", "5_1", str(tmp_path))
    assert last_error(record) is None
    (tmp_path / "5_1_0_log.out").write_text("a\nerror: the disk is full\nmore\nsrun: error: n1: task 0: Exited\n")
    (tmp_path / "5_1_1_log.out").write_text("error (rank 1): another rank ended\n")
    assert last_error(record) == "error: the disk is full"
    (tmp_path / "5_1_0_log.out").write_text("Traceback (most recent call last):\n  x\ntorch.OutOfMemoryError: CUDA\n")
    assert last_error(record) == "torch.OutOfMemoryError: CUDA"


def test_a_sweeps_table_has_every_point(tmp_path: Path) -> None:
    points = {f"lr={lr},m={m}": {"lr": lr, "m": m} for lr in ("1e-3", "1e-2") for m in ("a", "b")}
    refused = {"lr=1e-2,m=b": "m=b has no lr"}
    write_sweep_file(tmp_path, points, refused, dict.fromkeys(points, "validation"))
    for number, name in enumerate(list(points)[:2]):
        folder = make_run(tmp_path / name, state="finished")
        metrics = {"last": 10.0 + number, "accuracy": [[1, 2], [3, 4]], "wall_seconds": 7}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    make_run(tmp_path / "lr=1e-2,m=a", state="stopped")
    rows = write_sweep_table(tmp_path)
    assert [row.state for row in rows] == ["finished", "finished", "stopped", "refused"]
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert lines[0] == "point,lr,m,split,state,job,last,average,transfer,bwt,forgetting,wall_seconds,error"
    assert lines[2] == '"lr=1e-3,m=b",1e-3,b,validation,finished,,11.0,,,,,7,'
    assert lines[4] == '"lr=1e-2,m=b",1e-2,b,validation,refused,,,,,,,,m=b has no lr'
    page = (tmp_path / "report.html").read_text()
    assert "Best by Last: <code>lr=1e-3, m=b</code>, 11.0 percent on the validation split." in page
    assert page.count('class="chart"') == 2 and "Last by m" in page and "<a href" not in page.replace('href="#', "")
    (tmp_path / "lr=1e-3,m=b" / "report.html").write_text("the report of that point")
    write_sweep_table(tmp_path)
    assert 'href="lr%3D1e-3%2Cm%3Db/report.html"' in (tmp_path / "report.html").read_text()
    # a later sweep into the same folder
    write_sweep_file(tmp_path, {"lr=1": {"lr": "1"}}, {}, {"lr=1": "test"})
    later = write_sweep_table(tmp_path)[-1]
    assert (later.name, later.split) == ("lr=1", "test") and len(write_sweep_table(tmp_path)) == 5
    make_run(tmp_path / "lr=1", state="finished")
    (tmp_path / "lr=1" / "metrics.json").write_text(json.dumps({"last": 50.0}))
    write_sweep_table(tmp_path)
    assert "50.0 percent on the test split: it is no measure" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_a_sweep_on_this_machine_trains_only_what_is_due(toy: list[str], tmp_path: Path) -> None:
    words = "sweep --recipe mini_mtil --cluster local --wait --folder".split() + [str(tmp_path / "s")]
    words += [*toy, "train.lr=1e-3,1e-2", "tasks=[country_flags]", "train.iterations=2", "train.global_batch_size=8"]
    tool = [sys.executable, str(Path(__file__).resolve().parents[2] / "launchers/submit.py")]
    first = subprocess.run([*tool, *words], capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "2 points, 2 submitted now" in first.stdout and "best by Last: train.lr=" in first.stdout
    assert f" on the validation split\nthe table: {tmp_path}/s/sweep.csv; the best as a recipe: " in first.stdout
    best = load_config(tmp_path / "s/best.yaml")
    assert best.train.lr in (1e-3, 1e-2) and best.data.evaluate_on == "test" and best.tasks == ["country_flags"]
    (tmp_path / "s" / "train.lr=1e-2" / "status.json").unlink()
    again = subprocess.run([*tool, *words], capture_output=True, text=True)
    assert "2 points, 1 submitted now" in again.stdout and again.returncode == 0
