"""What a TAB completes in a real bash."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1p_dist import cli
from r1p_dist.config_reference import sections
from r1p_dist.shipped import shipped_files

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")

# by line, what is offered: those words among others, or, where the second is True, no other ones
CASES = {
    "r1p ": (set(cli.COMMANDS), False),
    "r1p conv": ({"convert"}, True),
    "r1p train --ranks 2 --re": ({"--recipe"}, True),
    "r1p train --recipe mini_": ({name for name in shipped_files("recipes", ".yaml") if name[:5] == "mini_"}, True),
    "r1p train --recipe mini_mtil ": ({f"{key.name}=" for part in sections() for key in part.keys}, False),
    "r1p train --recipe mini_mtil seed=1 --ranks 2 train.l": ({"train.lr="}, True),
    "r1p train train.precision=": ({"auto", "fp32", "bf16"}, True),
    "r1p train method=ste": ({"steady"}, True),
    "r1p extend runs/trial --task more data.sho": ({"data.shots="}, True),
    "r1p config checkpoint.k": ({"checkpoint.keep"}, True),
    "r1p export runs/trial --to ": ({"open_clip", "hf", "peft"}, True),
    "r1p submit sweep --sampler ": ({"random", "tpe"}, True),
    "r1p convert verify --": ({"--help"}, True),
    "r1p doctor ": ({"--help"}, True),  # and nothing of the machine
    "r1p-submit --prof": ({"--profile"}, True),
}
ASK = """
ask() {
  COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9 COMPREPLY=()
  _python_argcomplete "${1%% *}"
  local IFS=,
  echo "${COMPREPLY[*]}"
}
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The programs of an installation as this checkout has them, first on the PATH."""
    for name, function in (("r1p", "main"), ("r1p-submit", "submit")):
        call = f"#!{sys.executable}\nfrom r1p_dist import cli\nraise SystemExit(cli.{function}())\n"
        (tmp_path / name).write_text(call)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
    return tmp_path


def test_what_can_stand_at_the_cursor_is_offered(programs: Path) -> None:
    asked = "".join(f"ask {shlex.quote(line)}\n" for line in CASES)
    script = f'eval "$(r1p completion bash)"\n{ASK}{asked}'
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and done.stderr == ""
    offered = [{word.strip() for word in line.split(",")} for line in done.stdout.splitlines()]
    for (line, (words, is_all)), found in zip(CASES.items(), offered, strict=True):
        assert found == words if is_all else found > words, line


def test_a_tab_completes_in_a_terminal_also_behind_a_path(programs: Path) -> None:
    terminal, inside = pty.openpty()
    ends = {"stdin": inside, "stdout": inside, "stderr": inside, "env": os.environ | {"TERM": "dumb"}}
    shell = subprocess.Popen(["bash", "--norc", "--noprofile", "-i"], start_new_session=True, **ends)
    os.close(inside)
    try:
        os.write(terminal, b'eval "$(r1p completion bash)"; bind "set enable-bracketed-paste off"; echo rea""dy\n')
        read_until(terminal, b"ready\r\n")
        os.write(terminal, b"r1p train --recipe mini_mtil_d\t")
        read_until(terminal, b"r1p train --recipe mini_mtil_dac ")
        os.write(terminal, f"\x15{programs}/r1p dry\t".encode())  # Ctrl-U empties the line
        read_until(terminal, b"/r1p dry-run ")
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)


def read_until(terminal: int, text: bytes) -> None:
    found, end = b"", time.monotonic() + 120
    while text not in found:
        assert time.monotonic() < end, found
        if select.select([terminal], [], [], 1)[0]:
            found += os.read(terminal, 4096)


def test_other_shells_get_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    for shell, words in (("zsh", "#compdef r1p"), ("fish", "complete --command r1p")):
        assert cli.main(["completion", shell]) == 0
        assert words in capsys.readouterr().out
    assert cli.main(["completion", "ksh"]) == 2
