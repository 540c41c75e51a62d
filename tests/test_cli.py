"""The command line: `r1p`, launchers/train.py and the Makefile's first answer."""

import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from r1p_dist import cli, doctor, errors
from r1p_dist.config import RunConfig
from r1p_dist.errors import InputError
from r1p_dist.recipes import load_config

ROOT = Path(__file__).parents[1]
LAUNCHER = str(ROOT / "launchers" / "train.py")
launcher = partial(cli.run_command, "train")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Replace the training by a list of the configurations that it was called with."""
    calls: list[RunConfig] = []
    module = types.ModuleType("r1p_dist.train")
    module.run = calls.append
    monkeypatch.setitem(sys.modules, "r1p_dist.train", module)
    monkeypatch.delenv("RANK", raising=False)
    return calls


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "RANK"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=500, env=clean | environment, cwd=ROOT
    )


@pytest.mark.parametrize("entry", [lambda argv: cli.main(["train", *argv]), launcher], ids=["r1p", "launcher"])
def test_overrides_may_stand_anywhere_between_the_flags(entry, trained: list[RunConfig]) -> None:
    assert entry(["seed=3", "--recipe", "mini_mtil_dac", "options.rank=10", "train.lr=1e-4"]) == 0
    assert trained == [load_config("mini_mtil_dac", ["seed=3", "options.rank=10", "train.lr=1e-4"])]


@pytest.mark.parametrize("flag", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"]])
def test_launcher_takes_deepspeeds_local_rank(flag: list[str], trained: list[RunConfig]) -> None:
    assert launcher([*flag, "--recipe", "mini_mtil_dac"]) == 0
    assert trained == [load_config("mini_mtil_dac")]


def test_print_config_prints_the_resolved_configuration_and_does_not_train(
    trained: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--recipe", "mini_mtil_dac", "--print-config", "seed=3"]) == 0
    assert capsys.readouterr().out == load_config("mini_mtil_dac", ["seed=3"]).dump()
    assert trained == []


def test_only_rank_0_prints_the_configuration(
    trained: list[RunConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert launcher(["--recipe", "mini_mtil_dac", "--print-config"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "--recipe", "mini_mtill"], "error: recipe 'mini_mtill'"),
        (["train", "--recipe", "mini_mtil_dac", "seed"], "error: command line: 'seed' is not an override"),
        (["train", "--recipe", "mini_mtil_dac", "options.merged=9"], "error: command line: options.merged=9"),
        (["train", "--recipe", "mini_mtil_dac", "--dry"], "error: unrecognized arguments: --dry"),
        (
            ["train", "--recipe", "mini_mtil_dac", "--train.lr=1"],
            "error: unrecognized arguments: --train.lr=1; write train.lr=1 ",
        ),
        (["train"], "error: the following arguments are required: --recipe"),
        (["methods", "dac"], "error: unrecognized arguments: dac"),
        (["extend", "runs/a", "--task", "b", "--dry"], "error: unrecognized arguments: --dry"),
        (["export", "runs/a"], "error: the following arguments are required: --to (r1p export --help shows how)"),
        (["predict", "nowhere", "x.jpg"], "error: nowhere: no such folder; give that of a run or of an export"),
        (["report", "nowhere"], "error: nowhere/metrics.json: "),
        (["convert", "nowhere", "shards"], "error: nowhere: "),
        (["convert", "nowhere", "shards", "--from", "tar"], "error: --from tar: no such kind; there are folder, "),
        (["compare", "--output", "x", "--seeds", "a"], "error: --seeds a: not whole numbers"),
        (["plan", "--batch", "8"], "error: the following arguments are required: --model (r1p plan --help"),
        (["submit", "--recipe", "nowhere"], "error: recipe 'nowhere'"),
        (["sweep"], "error: one of the arguments --recipe --file is required (r1p sweep --help"),
        (["status", "nowhere"], "error: nowhere: no such folder"),
        (["logs", "nowhere"], "error: nowhere: no job was submitted"),
        (["cancel", "nowhere"], "error: nowhere: no job was submitted"),
        (["trane"], "error: argument COMMAND: invalid choice: 'trane'"),
        ([], "error: the following arguments are required"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    argv: list[str], expected: str, trained: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and expected.removeprefix("error: ") in captured.err
    assert captured.err.count("\n") == 1
    assert trained == []


def test_other_ranks_let_rank_0_speak_first_then_give_their_own_error(
    trained: list[RunConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(errors.time, "sleep", waits.append)
    assert launcher(["--recipe", "nowhere"]) == 2
    assert waits == [errors._OTHER_RANKS_WAIT_S]
    assert capsys.readouterr().err.startswith("error (rank 1): recipe 'nowhere'")


def test_an_error_of_the_training_itself_is_one_line_too(
    trained: list[RunConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: RunConfig) -> None:
        raise InputError("shard.tar: empty")

    monkeypatch.setattr(sys.modules["r1p_dist.train"], "run", fail)
    assert cli.main(["train", "--recipe", "mini_mtil_dac"]) == 2
    assert capsys.readouterr().err == "error: shard.tar: empty\n"


@pytest.mark.parametrize("is_set", [True, False])
def test_allocator_hint_is_given_only_on_cpu_and_only_when_it_is_unset(
    is_set: bool, trained: list[RunConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name in doctor.ALLOCATOR_VARIABLES:
        if is_set:
            monkeypatch.setenv(name, str(doctor.ALLOCATOR_VALUE))
        else:
            monkeypatch.delenv(name, raising=False)
    launcher(["--recipe", "mini_mtil_dac"])
    assert capsys.readouterr().out.count("\n") == (0 if is_set else 1)


def test_launcher_script_prints_the_configuration_without_importing_what_trains() -> None:
    heavy = "['deepspeed', 'open_clip', 'transformers', 'webdataset']"
    blocked = f"import sys; sys.modules |= dict.fromkeys({heavy}); import runpy; sys.argv = sys.argv[1:]; "
    result = _python(
        "-c",
        f"{blocked}runpy.run_path(sys.argv[0], run_name='__main__')",
        LAUNCHER,
        "--recipe",
        "mini_mtil_dac",
        "--print-config",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == load_config("mini_mtil_dac").dump()


def test_launcher_script_fails_with_one_line() -> None:
    result = _python(LAUNCHER, "--local_rank=0", "--recipe", "mini_mtil_dac", "options.rank=many", RANK="0")
    assert result.returncode == 2
    assert result.stderr.startswith("error: command line: options.rank='many'")
    assert result.stderr.count("\n") == 1


def test_methods_says_of_each_what_its_class_says(capsys: pytest.CaptureFixture[str]) -> None:
    from r1p_dist.methods import method_class, shipped_methods

    assert cli.main(["methods"]) == 0
    lines = iter(capsys.readouterr().out.splitlines())
    for name in shipped_methods():
        method = method_class(name)
        assert next(lines) == f"{name}  {inspect.getdoc(method).partition(chr(10))[0]}"
        assert next(lines).startswith(f"    paper: {method.paper or 'none'}; stores {method.stores}; inference needs ")
        for key, (default, meaning) in flat_options(method.Options).items():
            assert next(lines) == f"    options.{key}={default}  {meaning}" and meaning


def flat_options(section: type, prefix: str = "") -> dict[str, tuple[str, str]]:
    found = {}
    for name, entry in section.model_fields.items():
        if isinstance(entry.default, BaseModel):
            found |= flat_options(type(entry.default), f"{prefix}{name}.")
        else:
            found[prefix + name] = yaml.safe_dump(entry.default).splitlines()[0], entry.description
    return found


def test_doctor_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor"])
    out = capsys.readouterr().out
    for word in (
        "package      torch ",
        "deepspeed",
        "accelerator",
        "cores",
        "memory",
        "bf16",
        "g++",
        "numactl",
        "MALLOC_",
    ):
        assert word in out
    assert code == (0 if out.endswith("nothing needed is missing\n") else 1)


def test_doctor_fails_when_the_compiler_is_missing_and_there_is_no_accelerator(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda program: None)
    assert doctor._examine_programs(accelerator=None) == ["g++ is missing"]
    assert doctor._examine_programs(accelerator="cuda") == []
    out = capsys.readouterr().out
    assert "apt install g++" in out
    assert "numactl      missing: " in out


def test_doctor_names_packages_that_are_missing_or_untested(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements = ["torch<1", "no-such-package>=3", "not-for-us; extra == 'test'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: requirements)
    assert doctor._examine_packages() == ["package no-such-package is missing"]
    out = capsys.readouterr().out
    assert "(tested: <1)" in out
    assert "not-for-us" not in out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"amx_bf16", "avx512_bf16"}, "AMX"), ({"avx512_bf16"}, "AVX512-BF16"), ({"avx2"}, "fp32 is faster")],
)
def test_doctor_knows_which_processors_are_fast_in_bf16(flags: set[str], expected: str) -> None:
    assert expected in doctor._bf16_speed(flags)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_alone_prints_what_there_is() -> None:
    result = subprocess.run(["make", "--no-print-directory"], capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert result.returncode == 0, result.stderr
    for target in ("make train", "make test ", "make test-all", "make lint", "make clean"):
        assert target in result.stdout


def test_every_command_is_listed_and_shows_its_own_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert re.search(rf"^    {name}\s", listed, re.MULTILINE)  # what it does may stand below a long name
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0 and f"usage: r1p {name}" in capsys.readouterr().out, command.module


@pytest.mark.parametrize(
    ("entry", "usage"),
    [
        ("launchers/submit.py", "submit.py --recipe RECIPE"),
        ("launchers/train.py", "train.py --recipe RECIPE"),
        ("tools/compare.py", "compare.py [-h] --output DIR"),
        ("tools/convert_shards.py", "convert_shards.py INPUT OUTPUT"),
        ("tools/export.py", "export.py [-h] --to {open_clip,hf,peft}"),
        ("tools/plan.py", "plan.py [-h] --model MODEL"),
        ("tools/report.py", "report.py [-h] [--matrix PNG] run_dir"),
    ],
)
def test_a_checkouts_entries_are_commands_under_names_of_their_own(
    entry: str, usage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / entry), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / entry), run_name="__main__")
    assert ended.value.code == 0 and f"usage: {usage}" in capsys.readouterr().out


def test_the_module_is_the_command_line() -> None:
    result = _python("-m", "r1p_dist", "train", "--recipe", "nowhere")
    assert result.returncode == 2 and result.stderr.startswith("error: recipe 'nowhere'")
