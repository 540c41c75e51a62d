"""How runs end badly, done and not pretended: one line each, the right exit code, and nothing left behind."""

import errno
import io
import json
import logging
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from r1p_dist import interrupts, runlog
from r1p_dist.cli import main
from r1p_dist.distributed import end_process_group
from r1p_dist.errors import EXIT_CTRL_C, EXIT_INPUT, EXIT_INTERRUPTED, EXIT_PIPE, InputError, Interrupted, report_errors
from r1p_dist.interrupts import StepAgreement
from r1p_dist.local_ranks import run_ranks
from r1p_dist.memory_faults import memory_faults_named
from r1p_dist.output import error_terminal, noise_in, terminal
from r1p_dist.recipes import load_config
from r1p_dist.runlog import RunLog
from r1p_dist.scores import ending

ROOT = Path(__file__).parents[1]


def ends(command: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Returns the exit code of a program that does this, and the one line that it prints."""
    code = report_errors(lambda: command() and 0)
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


def test_want_of_memory_names_batch_model_and_remedies(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("mini_mtil_dac", ["train.global_batch_size=64"])

    def too_much() -> None:
        with memory_faults_named(config):
            torch.empty(1 << 60)

    code, line = ends(too_much, capsys)
    assert code == EXIT_INPUT and line.startswith("error: out of memory of the host: train.global_batch_size=64")
    assert "backbone.name=tiny" in line and "backbone.gradient_checkpointing=true" in line
    for error, where in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "an accelerator"),
        (MemoryError(), "the"),
    ):
        with pytest.raises(InputError, match=f"out of memory of {where}"), memory_faults_named(config):
            raise error
    with pytest.raises(RuntimeError, match="of another kind"), memory_faults_named(config):
        raise RuntimeError("of another kind")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, "")
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    code, line = ends(lambda: log.step("a", 1, {"loss": 1.0, "samples_per_second": 1.0}), capsys)
    assert code == EXIT_INPUT and os.strerror(errno.ENOSPC) in line and "make room there" in line


def test_a_reader_that_went_away_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    there, output = os.pipe()
    os.close(there)
    with open(output, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert report_errors(lambda: print("a line")) == EXIT_PIPE
    monkeypatch.undo()
    assert capfd.readouterr().err == ""

    def other_pipe() -> int:
        raise BrokenPipeError(errno.EPIPE, "a worker's")

    with pytest.raises(BrokenPipeError, match="a worker's"):
        report_errors(other_pipe)


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """The environment of rank 0 of two, where nothing is compiled yet."""
    import deepspeed

    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    yield monkeypatch


@pytest.mark.skipif(torch.accelerator.is_available(), reason="ranks on accelerators compile nothing")
def test_several_ranks_without_a_compiler_are_told_so_and_one_rank_needs_none(
    two_ranks: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from r1p_dist.engine import start_process_group

    ninja = tmp_path / "bin/ninja"
    ninja.parent.mkdir()
    ninja.symlink_to(Path(sys.executable).with_name("ninja"))
    two_ranks.setenv("PATH", str(ninja.parent))
    two_ranks.setenv("MASTER_PORT", "1")
    with pytest.raises(InputError) as fault:
        start_process_group()
    assert str(fault.value).startswith("c++: the C++ compiler is missing: apt install g++;")
    two_ranks.setenv("WORLD_SIZE", "1")
    two_ranks.setenv("MASTER_PORT", "0")
    assert start_process_group().type == "cpu"
    end_process_group()


def test_a_port_in_use_is_one_line_that_names_it(two_ranks: pytest.MonkeyPatch) -> None:
    import deepspeed

    from r1p_dist.engine import start_process_group

    two_ranks.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        two_ranks.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(InputError, match=rf"MASTER_PORT={other.getsockname()[1]}: another program has this port"):
            start_process_group()


RANK = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
def stop(number, frame):
    os.write(1, f"rank {rank} of {os.environ['WORLD_SIZE']} saved\\n".encode())  # at once: the other one writes too
    sys.exit(75)
signal.signal(signal.SIGINT, stop)
open(f"{sys.argv[1]}/{rank}", "w").close()
what = sys.argv[2]
if what == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if what == "wrong" and rank == 0:
    sys.exit(2)
if what == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if what == "leaves":
    signal.signal(signal.SIGINT, signal.SIG_DFL if rank else lambda *_: None)
    time.sleep(60 if rank else 2)
elif what != "done":
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("what", "interrupts", "code", "line"),
    [
        ("done", 0, 0, ""),
        ("wrong", 0, 2, ""),
        ("killed", 0, EXIT_INPUT, "error: rank 1 was ended by SIGKILL; so the kernel ends what takes too much memory"),
        ("waits", 1, EXIT_INTERRUPTED, ""),
        ("leaves", 1, 0, ""),  # rank 1 has done its part, rank 0 ends the run
        ("deaf", 2, EXIT_CTRL_C, "interrupted: ended at once; the last checkpoint stays"),
    ],
)
def test_ranks_of_this_machine_end_together(
    what: str, interrupts: int, code: int, line: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        for _ in range(interrupts):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)

    before, started = signal.getsignal(signal.SIGINT), time.monotonic()
    thread = threading.Thread(target=interrupt)
    if interrupts:
        thread.start()
    assert run_ranks([sys.executable, "-c", RANK, str(tmp_path), what], 2) == code
    assert time.monotonic() - started < 30, "nobody waits for those that sleep"
    assert signal.getsignal(signal.SIGINT) is before
    printed = capfd.readouterr()
    assert printed.err.splitlines() == ([line] if line else [])
    saved = ["rank 0 of 2 saved", "rank 1 of 2 saved"] if what == "waits" else []
    assert sorted(printed.out.splitlines()) == saved
    assert not [child for child in psutil.Process().children() if RANK in child.cmdline()]


@pytest.fixture
def ctrl_c_is_heard() -> Iterator[None]:
    """A worker of pytest-xdist does not listen to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_before_there_is_anything_to_save(ctrl_c_is_heard: None, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    code, line = ends(interrupted, capsys)
    assert code == EXIT_CTRL_C and line == "interrupted: Ctrl-C, before there was anything to save"


def test_a_second_ctrl_c_ends_at_once_and_handlers_go_with_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(interrupts.os, "_exit", ended.append)
    before = signal.getsignal(signal.SIGINT)
    agreement = StepAgreement(torch.device("cpu"))
    os.kill(os.getpid(), signal.SIGINT)
    assert (ended, agreement.stop_signal()) == ([], signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)  # a launcher sends this one behind the first
    assert ended == []
    os.kill(os.getpid(), signal.SIGINT)
    assert ended == [EXIT_CTRL_C] and capsys.readouterr().err.startswith("interrupted: ended at once")
    agreement.close()
    assert signal.getsignal(signal.SIGINT) is before


def test_what_libraries_print_goes_to_a_file_and_our_own_words_do_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run/launch.log"
    for _ in range(2):
        with noise_in(path):
            os.write(1, b"from C\n")
            subprocess.run(["echo", "from a compiler"], check=True)
            print("ours", file=terminal())
            print("wrong", file=error_terminal())
            logging.getLogger("r1p_dist.anything").warning("random weights")
    os.write(1, b"after\n")
    printed = capfd.readouterr()
    assert printed.out == 2 * "ours\n" + "after\n"
    assert printed.err == 2 * "wrong\nwarning: random weights\n"
    assert path.read_text() == 2 * "from C\nfrom a compiler\n"


def test_the_end_says_what_the_merge_cost_and_what_was_left_out(tmp_path: Path) -> None:
    metrics = {
        "accuracy": [[10.0, 20.0], [40.0, 21.0], [38.0, 55.0]],
        "before_merge": [60.0, 65.0],
        "last": 46.5,
        "forgetting": 2.0,
        "wall_seconds": 61.0,
        "bad_samples": {"train": [0, 0], "evaluation": [0, 0]},
    }
    head = "finished in 0:01:01: last 46.5 (zero-shot 15.0); forgetting 2.0; own 62.5 before the merge, 47.5 after"
    assert ending(metrics, tmp_path / "report.html") == f"{head}\nreport: {tmp_path / 'report.html'}"
    metrics |= {
        "bad_samples": {"train": [2, 0], "evaluation": [3, 1]},
        "before_merge": [None, None],
        "forgetting": None,
    }
    head = "finished in 0:01:01: last 46.5 (zero-shot 15.0); unusable samples: 2 replaced, 4 not evaluated"
    assert ending(metrics, tmp_path / "report.html").splitlines()[0] == head


class Screen(io.StringIO):
    """A terminal that keeps what is drawn."""

    def isatty(self) -> bool:
        return True


def test_progress_moves_with_every_step_and_tells_the_time_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(runlog, "terminal", lambda: screen)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    log = RunLog(tmp_path, "")
    log.begin("[zero-shot]", 3)
    for _ in range(2):
        log.advance()
    log.end()
    log.begin("flags", 3)
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: next(clock))
    for steps_left in (5, 3, 2):
        log.advance(steps_left)
    monkeypatch.undo()
    log.end()
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "[zero-shot]" in drawn and "2/3" in drawn
    assert "3/3" in drawn and "0:00:13 left of the stream" in drawn  # 3 steps took 20 s, and 2 are left


@pytest.mark.parametrize(
    ("error", "shown", "stays"),
    [
        (ValueError("a bug"), True, True),
        (InputError("wrong"), False, False),
        (Interrupted("saved", signal.SIGINT), False, True),
    ],
)
def test_the_last_lines_are_shown_for_what_nobody_expects(
    error: Exception, shown: bool, stays: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run/launch.log"
    with pytest.raises(type(error)), noise_in(path):
        os.write(1, b"".join(b"line %d\n" % number for number in range(30)))
        raise error
    lines = capfd.readouterr().err.splitlines()
    assert lines == ([f"the last lines of {path}:", *(f"line {n}" for n in range(10, 30))] if shown else [])
    assert path.exists() == stays, "the folder of a run that never began is not left"


@pytest.mark.slow
def test_a_first_hour(toy: list[str], tmp_path: Path) -> None:
    """Train on two ranks, Ctrl-C, the same command from another directory, export: what is printed, where, and when."""
    run = tmp_path / "run"
    words = [*toy, f"run_dir={run}", "tasks=[country_flags]", "train.global_batch_size=8", "log.every_steps=2"]
    command = [sys.executable, "-m", "r1p_dist", "train", "--ranks", "2", "--recipe", "mini_mtil_dac", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(
        [*command, "train.iterations=6", "checkpoint.every_steps=null"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    while first.poll() is None and '"training"' not in _text_of(run / "status.json"):
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=500)
    assert first.returncode == EXIT_INTERRUPTED, err
    status = json.loads(_text_of(run / "status.json"))
    saved = run / f"checkpoints/00-country_flags/step-{status['step']}"
    assert status["state"] == "stopped" and saved.is_dir()
    assert err == (
        f"interrupted: SIGINT at task country_flags step {status['step']}: saved in {saved}; the same command resumes "
        "there\n"
    )
    assert [line for line in out.splitlines() if not line.startswith(("country_flags step", "hint:"))] == [
        "dac on toy: tasks: 1, ranks: 2",
        "precision fp32: no accelerator; exact, and small models gain nothing from bf16 on CPU",
    ]
    assert "built successfully" in _text_of(run / "launch.log")

    # on a terminal, from another directory
    screen, terminal = pty.openpty()
    second = subprocess.Popen(
        [*command, "train.iterations=6", "checkpoint.every_steps=null"],
        stdout=terminal,
        stderr=terminal,
        cwd=tmp_path,
        env={**environment, "TERM": "xterm", "COLUMNS": "200"},
    )
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(screen, 1 << 16):
            shown += part
    except OSError as error:
        assert error.errno == errno.EIO  # the other end is closed
    os.close(screen)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert second.wait(timeout=100) == 0, shown
    assert f"resumes from {saved}" in shown
    before, after = "country_flags before the merge", "all tasks after country_flags"
    assert all(
        part in shown for part in ("country_flags ", before, "country_flags: merge", after, "country_flags: save")
    )
    assert "left of the stream" in shown or status["step"] > 4
    assert re.search(
        r"finished in 0:\d\d:\d\d: last [\d.]+ \(zero-shot [\d.]+\); own [\d.]+ before the merge, [\d.]+ after", shown
    )
    assert f"report: {run / 'report.html'}" in shown and (run / "report.html").is_file()
    assert "DeepSpeed" not in shown and "WARNING" not in shown

    export = [sys.executable, "-m", "r1p_dist", "export", str(run), "--to", "open_clip"]
    exported = subprocess.run(export, capture_output=True, text=True, timeout=500, env=environment)
    assert (exported.stdout, exported.stderr) == (f"{run / 'export/open_clip'}\n", "")


def _text_of(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def test_a_finished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("mini_mtil_dac", [f"run_dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(config.dump())
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    assert main(["train", "--recipe", "mini_mtil_dac", f"run_dir={tmp_path}"]) == 0
    expected = f"{tmp_path}: this run is finished; report: {tmp_path / 'report.html'}; resume=never starts it over\n"
    assert capsys.readouterr().out == expected


def test_a_save_that_failed_is_not_called_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from r1p_dist.checkpoint import Checkpoints, checkpoints

    class Nothing:
        tensors = dict
        locals = staticmethod(lambda: torch.zeros(1, 1))

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    saves = Checkpoints(load_config("mini_mtil_dac", [f"run_dir={tmp_path}"]))

    def save(step: int, fault: OSError | None) -> bool:
        def write(*_: object) -> None:
            if fault is not None:
                raise fault

        monkeypatch.setattr(checkpoints, "write_folder", write)
        saves.save(f"00-a/step-{step}", {}, {}, Nothing(), {})
        return saves.wait()

    assert [save(1, None), save(2, full), save(3, None)] == [True, False, True]
