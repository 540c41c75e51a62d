"""A run whose nodes and time are taken away, again and again, ends with the bits of one that nobody disturbed."""

import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.slurm.conftest import SCRIPT, SLURM
from tests.slurm.runs import RECIPE, SETTINGS, Run, ask, submit, wait_until
from tests.test_resume import assert_equal
from tests.test_train import run_stream

pytestmark = SLURM
TWO_NODES = ["--profile", "loopback"]


@pytest.fixture(scope="module")
def calm(run_distributed, toy: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nothing happens to; test_submit.py compares one on two nodes with one process."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    run_distributed(run_stream, 2, [*RECIPE[2:], *toy, *SETTINGS, f"run_dir={folder}"])
    return folder


def preempted(run: Run, cluster: Path) -> None:
    """A job of a higher partition wants the nodes, and gets them as soon as the run has saved."""
    job = ask("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=:")
    wait_until("the job of the higher partition has run", lambda: not ask("squeue", "--noheader", "--jobs", job))


def queued_again_from_outside(run: Run, cluster: Path) -> None:
    ask("scontrol", "requeue", run.job)


def time_limit_near(run: Run, cluster: Path) -> None:
    """So near that SLURM gives notice, which it does every half minute; until then the ranks are in a long step. From
    then on signals go on, through the agreement, the save and the requeue."""
    ranks = [run.rank(0), run.rank(1)]
    for rank in ranks:
        rank.suspend()  # SLURM wakes those that it sends a signal
    wait_until("the ranks are suspended", lambda: all(is_suspended(rank) for rank in ranks))
    hours, minutes, seconds = map(int, run.about_job("RunTime").split(":"))
    limit = 60 * hours + minutes + (1 if seconds < 30 else 2)  # in 30 to 90 s
    ask("scontrol", "update", f"JobId={run.job}", f"TimeLimit={limit}")
    restarts = run.restarts
    wait_until("SLURM wakes the ranks", lambda: not any(is_suspended(rank) for rank in ranks))
    while any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks):
        for rank in ranks:
            try:
                rank.send_signal(signal.SIGUSR2)
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.01)
    wait_until("the job is queued again", lambda: run.restarts > restarts)
    ask("scontrol", "update", f"JobId={run.job}", "TimeLimit=30")


def is_suspended(rank: psutil.Process) -> bool:
    return rank.is_running() and rank.status() == psutil.STATUS_STOPPED


def rank_killed(run: Run, cluster: Path) -> None:
    run.rank(0).kill()


def node_lost(run: Run, cluster: Path) -> None:
    """Nothing of the node answers until SLURM has given it up; then it comes back."""
    rank = run.rank(1)
    daemon = psutil.Process(int((cluster / "slurmd-n2.pid").read_text()))
    for process in (daemon, rank.parent(), rank):
        process.kill()
    wait_until("the node is given up", lambda: "down" in ask("sinfo", "--noheader", "--nodes=n2", "--Format=statelong"))
    subprocess.run([SCRIPT, "node", cluster, "n2"], check=True)


EVENTS = (preempted, queued_again_from_outside, time_limit_near, rank_killed, node_lost)


def test_a_run_goes_on_through_all_that_a_cluster_does_to_it(
    calm: Path, cluster: Path, toy: list[str], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    submit(*RECIPE, *toy, *SETTINGS, *TWO_NODES, "--partition", "low", f"run_dir={run.folder}")
    for number, event in enumerate(EVENTS):
        run.wait_for_steps(3)
        event(run, cluster)
        run.wait_for_restart(number + 1)
    run.wait_for_steps(3)
    submit("cancel", str(run.folder))
    run.wait_for_end()
    assert run.status["state"] == "stopped"
    # All but the killed rank and the lost node left a checkpoint of the very step.
    log = (run.folder / "jobs" / f"{run.job}_0_log.out").read_text()
    told = re.findall(r"(SIG\w+) at task \w+ step \d+: saved in", log)
    assert told == ["SIGUSR2", "SIGTERM", "SIGUSR2", "SIGTERM"]
    one_node = ["--nodes", "1", "--tasks-per-node", "2", "--partition", "main"]
    submit(*RECIPE, *toy, *SETTINGS, *one_node, "--wait", f"run_dir={run.folder}")
    assert run.restarts == 0
    assert_equal(calm, run.folder)
