"""Every --help answers at once, and a run imports the libraries of its own backbone alone.

CPU seconds depend on the machine, so what is looked at is what would take them.
"""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from r1p_dist.cli import COMMANDS
from r1p_dist.data.stream import ASSETS
from tests.data.toy_task import write_tar

ROOT = Path(__file__).parents[1]
# Each takes a quarter of a second or more, or brings one that does.
HEAVY = (
    *("torch", "torchvision", "transformers", "open_clip", "deepspeed", "matplotlib", "webdataset"),
    *("numpy", "pydantic", "rich", "submitit", "fsspec"),
)
ENTRIES = sorted(str(path) for folder in ("tools", "tools/dev", "launchers") for path in (ROOT / folder).glob("*.py"))
COMMAND_LINES = [
    *([entry, "--help"] for entry in ENTRIES),
    *([str(ROOT / "tools/dev/benchmark.py"), name, "--help"] for name in ("step", "data", "scaling", "table")),
    *([str(ROOT / "tools/convert_shards.py"), name, "--help"] for name in ("verify", "stats")),
    *([str(ROOT / "launchers/submit.py"), name, "--help"] for name in ("sweep", "status", "logs", "cancel")),
    [str(ROOT / "tools/dev/pretrain_tiny.py"), "--kind", "llava", "--help"],
    ["r1p", "--help"],
    *(["r1p", name, "--help"] for name in COMMANDS),
]
# Each in an interpreter of its own would take half a second; what one imports lightly, the next one may have.
SCRIPT = """
import contextlib, io, json, os, runpy, sys
heavy, commands = json.load(sys.stdin)
sys.modules.update(dict.fromkeys(heavy))  # to import one of them is an ImportError now
os.environ.update(MALLOC_TRIM_THRESHOLD_="1", MALLOC_MMAP_THRESHOLD_="1")  # else a benchmark starts itself again
for command in commands:
    sys.argv = command
    sys.path[0] = os.path.dirname(command[0])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            if command[0] == "r1p":
                from r1p_dist.cli import main
                sys.exit(main())
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, (command, end.code)
    print(json.dumps(out.getvalue()))
"""


def _run(commands: list[list[str]], heavy: tuple[str, ...]) -> list[str]:
    """Returns what each command prints; fails where one imports a heavy package."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([heavy, commands]),
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_help_needs_nothing_heavy() -> None:
    printed = _run(COMMAND_LINES, HEAVY)
    assert len(printed) == len(COMMAND_LINES) >= 45, "not every command was tried"
    assert all("usage: " in text for text in printed)


def test_the_list_of_methods_needs_nothing_heavy() -> None:
    (printed,) = _run([["r1p", "methods"]], HEAVY)
    assert "dac  " in printed


@pytest.fixture(scope="module")
def few_questions(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of the recipe `mini_instruct`: one task of four questions for each split."""
    folder = tmp_path_factory.mktemp("questions")
    entry = {"name": "yes_no", "metric": "exact_match", "max_new_tokens": 2}
    for split in ("train", "test"):
        entry[split] = [f"{split}.tar"]
        with tarfile.open(ASSETS / f"mini_instruct/yes_no/{split}-000000.tar") as tar:
            members = tar.getmembers()[:8]  # a picture and a conversation each
            write_tar(folder / f"{split}.tar", [(member.name, tar.extractfile(member).read()) for member in members])
    (folder / "stream.yaml").write_text(yaml.safe_dump({"name": "few", "tasks": [entry]}))
    return [f"stream={folder}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "small", "other"),
    [("mini_mtil_dac", "toy", "transformers.models.llava"), ("mini_instruct", "few_questions", "open_clip")],
)
def test_a_run_imports_the_libraries_of_its_own_backbone_alone(
    recipe: str, small: str, other: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    script = f"""
import sys
from r1p_dist.cli import main
code = main()
unneeded = [{other!r}, "torch._inductor.compile_fx"]  # the latter: DeepSpeed's Muon would set the compiler up
print([name for name in sys.modules if name.startswith(tuple(unneeded))])
sys.exit(code)
"""
    settings = [*request.getfixturevalue(small), "train.iterations=1", "train.global_batch_size=2"]
    command = [sys.executable, "-c", script, "train", "--recipe", recipe, f"run_dir={tmp_path}/run", *settings]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "run/report.html").is_file(), "not the whole way"
