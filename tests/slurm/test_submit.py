"""Runs on two nodes: their numbers, their states and logs, and what SLURM refuses."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import pytest
from safetensors.torch import load_file

from r1p_dist.checkpoint.checkpoints import checkpoint_folders
from tests.slurm.conftest import SLURM
from tests.slurm.runs import PATIENCE_S, ROOT, Run, ask, submit, wait_until
from tests.test_resume import experts, log_lines
from tests.test_train import read_metrics

pytestmark = SLURM
SHORT = [
    "--recipe",
    "mini_mtil_dac",
    "tasks=[country_flags, playing_cards]",
    "train.iterations=6",
    "train.global_batch_size=8",
]
SHORTEST = ["--recipe", "mini_mtil_dac", "tasks=[country_flags]", "train.iterations=2", "train.global_batch_size=8"]
TWO_NODES = ["--profile", "loopback"]
# DeepSpeed's launcher would log in on the first host, to see that it can and to ask for its address.
WITHOUT_SSH = ["--no_ssh_check", "--master_addr", "127.0.0.1"]


def activation_counts(run_dir: Path) -> dict[str, list[int]]:
    """Of each layer's experts, when the last task had been trained."""
    state = load_file(checkpoint_folders(run_dir / "checkpoints")[0] / "method.safetensors")
    counts = {name: tensor.tolist() for name, tensor in state.items() if name.endswith("activation_counts")}
    assert counts and all(sum(count) > 0 for count in counts.values())
    return counts


def test_two_nodes_train_what_one_process_trains_and_can_be_watched(toy: list[str], tmp_path: Path) -> None:
    two, one = Run(tmp_path / "two"), Run(tmp_path / "one")
    submit(*SHORT, *toy, *TWO_NODES, f"run_dir={two.folder}")
    watch = [sys.executable, "-m", "r1p_dist", "watch", str(two.folder), "--port", "0"]
    with subprocess.Popen(watch, cwd=ROOT, stdout=subprocess.PIPE, text=True) as watching:
        address = watching.stdout.readline().split()[0]
        wait_until("rank 0 is at work", lambda: two.status.get("state") == "evaluating")
        with urlopen(address, timeout=PATIENCE_S) as page:
            assert re.search(r"The run is (evaluating|training)", page.read().decode())
        states = submit("status", str(tmp_path)).stdout.splitlines()
        folder, state, method, *_, job = states[1].split()
        assert len(states) == 2 and (folder, method, job) == (str(two.folder), "dac", two.job)
        assert state in ("evaluating", "training"), "to ask takes longer than to evaluate so few pictures"
        followed = submit("logs", str(two.folder), "-f").stdout
        assert followed == submit("logs", str(two.folder)).stdout and "[2/2] playing_cards" in followed
        said = watching.communicate(timeout=PATIENCE_S)[0]
    assert (said, watching.returncode) == (f"{two.folder}: finished; report: {two.folder}/report.html\n", 0)
    assert submit("status", str(tmp_path)).stdout.splitlines()[1].split()[1] == "finished"
    nodes = ask("sacct", "--noheader", "--allocations", "--parsable2", "--format=NodeList,State", "--jobs", two.job)
    assert nodes == "n[1-2]|COMPLETED"

    submit(*SHORT, *toy, "--cluster", "debug", f"run_dir={one.folder}")
    assert read_metrics(two.folder)["world_size"] == 2 and read_metrics(one.folder)["world_size"] == 1
    assert activation_counts(two.folder) == activation_counts(one.folder)
    products = [
        {name: run[f"{name}.B"] @ run[f"{name}.A"] for name in {key.rpartition(".")[0] for key in run}}
        for run in (experts(two.folder), experts(one.folder))
    ]
    size = sum(update.square().sum() for update in products[1].values()).sqrt()
    error = sum((products[0][name] - update).square().sum() for name, update in products[1].items()).sqrt()
    assert error / size < 1e-3
    for ours, theirs in zip(log_lines(two.folder), log_lines(one.folder), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_what_slurm_refuses_is_one_line(tmp_path: Path) -> None:
    refused = submit(*SHORT, *TWO_NODES, "--partition", "nowhere", f"run_dir={tmp_path}/run", expect=2)
    assert len(refused.stderr.splitlines()) == 1 and "invalid partition specified: nowhere" in refused.stderr


def test_submissions_at_once_do_not_collide(tmp_path: Path) -> None:
    """Two of one run: one of them is refused. Of two runs: both get a job. Held, so none of them starts."""

    def command(name: str) -> tuple[int, str]:
        words = [*SHORT, *TWO_NODES, "--slurm=hold", f"run_dir={tmp_path}/{name}"]
        done = subprocess.run(
            [sys.executable, "launchers/submit.py", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        return done.returncode, done.stdout + done.stderr

    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(command, ["same", "same", "one", "other"]))
    assert sorted(code for code, _ in ends[:2]) == [0, 2] and [code for code, _ in ends[2:]] == [0, 0], ends
    assert "is pending for this run" in next(text for code, text in ends if code == 2)
    runs = [Run(tmp_path / name) for name in ("same", "one", "other")]
    assert len({run.job for run in runs}) == 3
    submit("cancel", *(str(run.folder) for run in runs))
    wait_until("none of them waits any more", lambda: not ask("squeue", "--noheader", "--me"))


def in_own_way(folder: Path, toy: list[str], *command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_JOB")}
    done = subprocess.run(
        [*command, "launchers/train.py", *SHORTEST, *toy, f"run_dir={folder}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert Run(folder).status["state"] == "finished" and read_metrics(folder)["world_size"] == 2


def test_srun_alone_starts_the_ranks(toy: list[str], tmp_path: Path) -> None:
    in_own_way(tmp_path, toy, "srun", "--nodes=2", "--ntasks=2", "--cpus-per-task=1", sys.executable)


def test_the_deepspeed_launcher_starts_the_ranks_through_slurm(toy: list[str], tmp_path: Path, free_port: int) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("n1 slots=1\nn2 slots=1\n")
    slurm = ["--launcher", "slurm", "--launcher_args", "--nodes=2 --cpus-per-task=1"]
    in_own_way(
        tmp_path / "run", toy, "deepspeed", *WITHOUT_SSH, f"--master_port={free_port}", "--hostfile", str(hosts), *slurm
    )
