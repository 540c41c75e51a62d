"""What comes from outside: signals, a launcher that is gone, losses that are no numbers, ranks that hang, two runs in
one folder."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from r1p_dist.errors import EXIT_HANGS, EXIT_INTERRUPTED, InputError
from r1p_dist.recipes import load_config
from r1p_dist.run_folder import RunFolder
from tests.forked_launch import ForkedLaunch
from tests.test_resume import SHORT
from tests.test_train import read_metrics

ROOT = Path(__file__).parents[1]
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))


@pytest.fixture
def start(toy: list[str], free_port: int) -> Iterator[Callable[..., subprocess.Popen]]:
    """start(run_dir, flags, *settings) starts ranks through DeepSpeed's launcher; none outlives the test."""
    started: list[subprocess.Popen] = []

    def start(run_dir: Path, flags: list[str], *settings: str) -> subprocess.Popen:
        command = [DEEPSPEED, *flags, "--master_port", str(free_port), "launchers/train.py"]
        command += ["--recipe", "mini_mtil", *SHORT, *toy, f"run_dir={run_dir}", *settings]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:  # the test has failed or took too long
            for descendant in [*psutil.Process(process.pid).children(recursive=True), process]:
                descendant.kill()
        process.communicate()


def wait_for(run_dir: Path, process: subprocess.Popen, state: str) -> dict:
    while process.poll() is None:
        if (run_dir / "status.json").is_file():
            status = json.loads((run_dir / "status.json").read_text())
            if status["state"] == state:
                return status
        time.sleep(0.02)
    pytest.fail(f"ended with {process.returncode} before it was {state}: {process.stdout.read()}")


def family(process: subprocess.Popen) -> tuple[psutil.Process, dict[str, psutil.Process]]:
    """Returns the launcher beside the ranks, and the ranks."""
    launcher, ranks = None, {}
    for child in psutil.Process(process.pid).children(recursive=True):
        if "deepspeed.launcher.launch" in child.cmdline():
            launcher = child
        elif "launchers/train.py" in child.cmdline():
            ranks[child.environ()["RANK"]] = child
    return launcher, ranks


@pytest.mark.slow
@pytest.mark.parametrize("how", ["USR2 to rank 1", "TERM to the launcher", "KILL to the launcher"])
def test_all_ranks_save_and_end_together(start, tmp_path: Path, how: str) -> None:
    settings = ["train.iterations=500", "checkpoint.every_steps=null", f"tasks=[{'playing_cards'}]"]
    flags = ["--num_accelerators", "2"]
    if how.startswith("TERM"):  # as on several nodes, of which this one is the first; the launcher would log in there
        (tmp_path / "hosts").write_text("localhost slots=2\n")
        flags = ["--hostfile", str(tmp_path / "hosts"), "--no_ssh_check", "--master_addr", "127.0.0.1"]
    process = start(tmp_path, flags, *settings)
    wait_for(tmp_path, process, "training")
    launcher, ranks = family(process)
    target = ranks["1"] if how.startswith("USR2") else launcher
    target.send_signal(getattr(signal, f"SIG{how.split()[0]}"))
    output = process.communicate(timeout=500)[0]
    assert psutil.wait_procs(list(ranks.values()), timeout=500)[1] == []
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "stopped" and status["step"] < 500
    (saved,) = (tmp_path / "checkpoints/00-playing_cards").iterdir()
    assert saved.name == f"step-{status['step']}"
    if not how.startswith("KILL"):
        assert f"at task playing_cards step {status['step']}: saved in {saved}" in output
        assert "Traceback" not in output
    if how.startswith("USR2"):
        assert process.returncode == EXIT_INTERRUPTED


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match=rf"process {os.getpid()} on .* is running in this folder; name another"):
        RunFolder(tmp_path / "run")
    first.close()
    RunFolder(tmp_path / "run").close()
    script = f"from pathlib import Path; from r1p_dist.run_folder import RunFolder; import time\n\
folder = RunFolder(Path({str(tmp_path / 'run')!r})); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {other.pid} on"):
        RunFolder(tmp_path / "run")
    other.kill()
    other.communicate()
    RunFolder(tmp_path / "run").close()  # nothing of a killed one stays


@pytest.mark.parametrize("place", ["/proc/run", "/sys/run"])
def test_a_folder_that_cannot_be_written_is_refused(place: str) -> None:
    with pytest.raises(InputError, match=f"run_dir={place}: cannot write in this folder"):
        RunFolder(Path(place))


def run_with_bad_losses(rank: int, world_size: int, overrides: list[str], bad_at: list[int], value: float) -> dict:
    """Runs with the loss of the last rank replaced at some micro steps; returns metrics or the error."""
    from r1p_dist.methods.dac import Dac
    from r1p_dist.train import run

    compute, calls = Dac.loss, []

    def loss(self, model, batch):
        result, parts = compute(self, model, batch)
        calls.append(None)
        return (result * value if len(calls) in bad_at and rank == world_size - 1 else result), parts

    Dac.loss = loss
    try:
        return {"metrics": json.dumps(run(load_config("mini_mtil", [*SHORT, *overrides])))}
    except InputError as error:
        return {"error": str(error)}


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_last_good_checkpoint(
    run_distributed, shallow_toy: list[str], tmp_path: Path, value: float
) -> None:
    settings = [*shallow_toy, f"run_dir={tmp_path}", "checkpoint.every_steps=2"]
    found = run_distributed(run_with_bad_losses, 2, settings, [4], value, timeout_s=1100)
    assert found[0] == found[1]
    assert re.search(
        r"task playing_cards step 4: the loss or a gradient is not finite; "
        r"the last good checkpoint: .*00-playing_cards/step-2; "
        r"try a smaller train.lr than .*, or faults.not_finite=skip",
        found[0]["error"],
    )
    names = [path.name for path in (tmp_path / "checkpoints/00-playing_cards").iterdir()]
    assert names == ["step-2"]


@pytest.mark.slow
def test_a_step_whose_loss_is_not_finite_can_be_left_out(
    run_distributed, shallow_toy: list[str], tmp_path: Path
) -> None:
    settings = [
        *shallow_toy,
        f"run_dir={tmp_path}",
        "faults.not_finite=skip",
        "log.every_steps=1",
        "tasks=[playing_cards]",
    ]
    settings.append("train.gradient_accumulation_steps=2")  # one micro batch of the second step is enough
    found = run_distributed(run_with_bad_losses, 2, settings, [3], math.nan, timeout_s=1100)
    assert "metrics" in found[0] and found[0].keys() == found[1].keys()
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert all(math.isfinite(value) for value in read_metrics(tmp_path)["accuracy"][-1])


def hang_on_rank_1() -> None:
    from r1p_dist.methods.dac import Dac

    def hang(method: Dac, trainer: object) -> None:
        if os.environ["RANK"] == "1":
            wait_for_nothing()

    Dac.after_step = hang


def wait_for_nothing() -> None:
    time.sleep(600)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_all_with_their_stacks(shallow_toy: list[str], tmp_path: Path) -> None:
    words = ["--recipe", "mini_mtil", *SHORT, *shallow_toy, f"run_dir={tmp_path}/run", "faults.hang_minutes=0.25"]
    process = ForkedLaunch(words, tmp_path / "log", hang_on_rank_1)
    code, output = process.wait(timeout=500), (tmp_path / "log").read_text()
    assert code == EXIT_HANGS, output
    assert "error (rank 1): nothing has moved for 15 s" in output and "error (rank 0): nothing has moved" in output
    stacks = {rank: (tmp_path / f"run/stacks/rank-{rank}.txt").read_text() for rank in (0, 1)}
    assert "wait_for_nothing" in stacks[1] and "wait_for_nothing" not in stacks[0]
    assert "fit.py" in stacks[0]


def step_agreement(rank: int, world_size: int) -> list:
    from r1p_dist.interrupts import StepAgreement

    agreement, found = StepAgreement(torch.device("cpu")), []
    for step in range(4):
        if step == 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        agreement.note(torch.tensor(math.nan if (step, rank) == (2, 0) else 1.0), step)
        withheld = agreement.exchange(gradients_are_finite=torch.tensor((step, rank) != (3, 1)))
        found.append([bool(withheld)])
    for entry, finding in zip(found, agreement.findings(), strict=True):
        entry += [finding.step, finding.signal and finding.signal.name, finding.not_finite]
    return found


def test_ranks_agree_at_the_same_step(run_distributed) -> None:
    first, second = run_distributed(step_agreement, 2)
    assert first == second
    assert first[:2] == [[False, 0, None, False], [False, 1, "SIGTERM", False]]
    assert first[2:] == [[True, 2, "SIGTERM", True], [True, 3, "SIGTERM", True]]  # a loss, and a gradient


def test_nothing_depends_on_the_clock_of_the_wall() -> None:
    sources = {path: path.read_text() for path in (ROOT / "r1p_dist").rglob("*.py")}
    assert [path for path, text in sources.items() if re.search(r"\btime\.time\(|datetime\.now|utcnow", text)] == []
