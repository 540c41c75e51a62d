"""A real SLURM for the tests in this folder: two nodes on the loopback address."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.runs import ask, wait_until

SCRIPT = Path(__file__).with_name("cluster.sh")
NOT_INSTALLABLE = 77
# They wait for SLURM's own times.
SLURM = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Starts the cluster, lets SLURM's programs find it, and returns the folder of its files."""
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([SCRIPT, "up", folder], capture_output=True, text=True)
    if started.returncode == NOT_INSTALLABLE and os.environ.get("R1P_SLURM") != "1":
        pytest.skip(f"no SLURM: {started.stderr.strip().splitlines()[-1]}")
    if started.returncode:
        pytest.fail(f"the SLURM cluster did not start:\n{started.stderr}")
    os.environ["SLURM_CONF"] = re.search(r"export SLURM_CONF=(.*)", started.stdout)[1]
    yield folder
    subprocess.run([SCRIPT, "down", folder], check=True)
    del os.environ["SLURM_CONF"]


@pytest.fixture(autouse=True)
def no_jobs_left(cluster: Path) -> Iterator[None]:
    """Ends what a test that failed has left in the queue."""
    yield
    subprocess.run(["scancel", "--me"], check=True)
    subprocess.run(["scancel", "--me", "--signal=KILL", "--full"], check=False)
    wait_until("the queue is empty", lambda: not ask("squeue", "--noheader", "--me"))
