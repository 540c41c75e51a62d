"""Every --help answers at once: nothing heavy is imported before the arguments are read.

CPU seconds depend on the machine, so what is looked at is what would take them.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "torchvision", "transformers", "open_clip", "deepspeed", "matplotlib", "webdataset")
ENTRIES = sorted(str(path) for folder in ("tools", "tools/dev", "launchers") for path in (ROOT / folder).glob("*.py"))
COMMANDS = [
    *([entry] for entry in ENTRIES),
    *([str(ROOT / "tools/dev/benchmark.py"), name] for name in ("step", "data", "scaling", "table")),
    *([str(ROOT / "tools/convert_shards.py"), name] for name in ("verify", "stats")),
    *([str(ROOT / "launchers/submit.py"), name] for name in ("sweep", "status", "logs", "cancel")),
    [str(ROOT / "tools/dev/pretrain_tiny.py"), "--kind", "llava"],
    *(["r1p", *name] for name in ([], ["train"], ["extend"], ["forget"], ["methods"], ["doctor"])),
]
# Each in an interpreter of its own would take half a second; what one imports lightly, the next one may have.
SCRIPT = """
import contextlib, io, json, os, runpy, sys
heavy, commands = json.load(sys.stdin)
sys.modules.update(dict.fromkeys(heavy))  # to import one of them is an ImportError now
os.environ.update(MALLOC_TRIM_THRESHOLD_="1", MALLOC_MMAP_THRESHOLD_="1")  # else a benchmark starts itself again
for command in commands:
    sys.argv = [*command, "--help"]
    sys.path[0] = os.path.dirname(command[0])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            if command[0] == "r1p":
                from r1p_dist.cli import main
                sys.exit(main())
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, (command, end.code)
    assert "usage: " in out.getvalue(), command
    print(len(out.getvalue()))
"""


def test_help_needs_nothing_heavy() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([HEAVY, COMMANDS]),
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == len(COMMANDS) > 25, "not every command was tried"
