"""Every command line of README and docs/ is read by the parser of its program, with its recipe and overrides.

Nothing is trained. What needs something that is not here, a cluster or another program, is named in ELSEWHERE.
"""

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from r1p_dist import cli
from r1p_dist.cluster.sweep import Sweep
from r1p_dist.compare.settings import labels_of, read_settings, settings_path
from r1p_dist.config_reference import sections
from r1p_dist.recipes import load_config
from tests.documents import DOCS, PAGES, ROOT, fences, name_of

# in place of words that stand for something
STANDS_FOR = {
    "METHOD": "dac",
    "LR": "1e-3",
    "OVERRIDES": "options.ago.weight=1",
    "SETTINGS": "seed=1",
    "NAME-OF-THE-CARD": "card",
    '"${labels[$SLURM_ARRAY_TASK_ID]}"': "dac",
    "runs/mini_mtil/config.yaml": "mini_mtil",
}
# programs of others, and the flags of them that the pages name
ELSEWHERE = {
    "sbatch": {"--parsable", "--array", "--gpus", "--dependency", "--wrap"},
    "pip": {"install"},
    "srun": {"--nodes", "--ntasks-per-node", "--gpus-per-node"},
    "deepspeed": {"--hostfile", "--num_accelerators", "--launcher"},
}
# what each launcher of tools/ and launchers/ is as a command of r1p
AS_COMMAND = {
    "tools/compare.py": "compare",
    "tools/convert_shards.py": "convert",
    "tools/export.py": "export",
    "tools/plan.py": "plan",
    "tools/report.py": "report",
    "launchers/train.py": "train",
    "launchers/submit.py": "submit",
}


class Read(BaseException):
    """The arguments as the program's own parser reads them, raised in place of doing anything with them."""

    def __init__(self, arguments: argparse.Namespace, words: Sequence[str]) -> None:
        self.arguments, self.words = arguments, words


def lines_of(page: Path) -> list[str]:
    """Return a page's command lines: of fenced blocks without a language, which hold nothing else, and of scripts."""
    blocks = [*fences(page, ""), *fences(page, "bash")]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


COMMANDS = [pytest.param(line, page, id=f"{name_of(page)}: {line}") for page in PAGES for line in lines_of(page)]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Lets every parser raise what it has read; for the words behind it, `parse_with_overrides` as well."""
    for name in ("parse_args", "parse_intermixed_args"):
        read = getattr(argparse.ArgumentParser, name)

        def raise_read(parser, args=None, namespace=None, read=read) -> None:
            arguments = read(parser, args, namespace)
            raise Read(arguments, getattr(arguments, "overrides", []))

        monkeypatch.setattr(argparse.ArgumentParser, name, raise_read)
    return monkeypatch


def test_pages_have_commands_of_all_programs() -> None:
    lines = [parameter.values[0] for parameter in COMMANDS]
    programs = [*AS_COMMAND, *ELSEWHERE, "r1p serve", "r1p watch", "make"]
    assert [program for program in programs if not any(program in line for line in lines)] == []
    assert len(lines) > 80


@pytest.mark.parametrize(("line", "page"), COMMANDS)
def test_a_command_is_one_that_its_program_takes(
    line: str, page: Path, reads: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = tmp_path / "trees.yaml"
    recipe.write_text(fences(DOCS / "tutorial.md", "yaml")[0])
    for name, value in {**STANDS_FOR, "trees.yaml": str(recipe)}.items():
        line = re.sub(rf"(?<![\w./-]){re.escape(name)}(?!\w)", value, line)
    for part in re.split(r"&&|\$\(", line.removesuffix(")") if "$(" in line else line):
        check(shlex.split(part), reads)


def check(words: list[str], reads: pytest.MonkeyPatch) -> None:
    """Fails for words that no program here, or no other that the pages name, takes."""
    while words and (re.match(r"\w+=", words[0]) or words[0] == "exec"):
        del words[0]
    if not words or words[-1].endswith(")"):
        return  # variables alone, a list of them among these
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        check_make(rest, reads)
    elif program == "r1p":
        check_r1p(rest[0], rest[1:], reads)
    elif program in ("python", "python3") and rest[0] in AS_COMMAND:
        check_r1p(AS_COMMAND[rest[0]], rest[1:], reads)
    elif program in ("python", "python3"):
        check_tool(ROOT / rest[0], rest[1:], reads)
    elif program in ELSEWHERE:
        scripts = [place for place, word in enumerate(rest) if word in AS_COMMAND]
        own = rest[: scripts[0]] if scripts else rest
        flags = {word.partition("=")[0] for word in own if word.startswith("--")}
        assert flags <= ELSEWHERE[program], f"{program}: {flags - ELSEWHERE[program]}"
        for place in scripts:
            check_r1p(AS_COMMAND[rest[place]], rest[place + 1 :], reads)
        for wrapped in (word for before, word in zip(rest, rest[1:], strict=False) if before == "--wrap"):
            check([] if wrapped == "bash compare.sh" else shlex.split(wrapped), reads)
    else:
        assert program in ("pre-commit", "."), f"no program of these pages: {program}"


def check_make(words: Sequence[str], reads: pytest.MonkeyPatch) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = set(re.findall(r"^(?:export )?(\w+) \?=", text, re.MULTILINE))
    targets = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert targets
    for word in words:
        name, is_setting, value = word.partition("=")
        assert name in (known if is_setting else targets[1].split()), f"make has no {name}"
        if name == "ARGS":
            check_r1p("train", shlex.split(value), reads)
        if name == "TESTS":
            assert all((ROOT / path).exists() for path in value.split())


def check_r1p(name: str, words: Sequence[str], reads: pytest.MonkeyPatch) -> None:
    assert name in cli.COMMANDS, f"r1p has no {name}"
    command = cli.COMMANDS[name]
    module = importlib.import_module(command.module)
    if split := getattr(module, "parse_with_overrides", None):

        def raise_read(parser, argv) -> None:
            reads.undo()
            raise Read(*split(parser, argv))

        reads.setattr(module, "parse_with_overrides", raise_read)
    with pytest.raises(Read) as found:
        getattr(module, command.function)(f"r1p {name}", words)
    reads.undo()
    check_configuration(name if words[:1] != ["sweep"] else "sweep", found.value)


def check_configuration(command: str, read: Read) -> None:
    arguments, words = read.arguments, list(read.words)
    if command == "sweep" and arguments.recipe:
        sweep = Sweep.parse(arguments.recipe, words, arguments.samples, arguments.sweep_seed)
        for point in sweep.points():
            load_config(arguments.recipe, [*sweep.overrides, *(f"{key}={value}" for key, value in point.items())])
    elif command == "compare":
        settings = read_settings(arguments.settings or settings_path(arguments.recipe))
        key, _, values = (arguments.tune or "seed=1").partition("=")
        for label in labels_of(arguments.methods, settings):
            own = settings.get(label, [])
            if not any(word.startswith("method=") for word in own):
                own = [f"method={label}", *own]
            for value in values.split(","):
                load_config(arguments.recipe, [*own, *words, f"{key}={value}"])
    elif command == "config" and arguments.key:
        assert arguments.key in {key.name for section in sections() for key in section.keys}
    elif getattr(arguments, "recipe", None):
        load_config(arguments.recipe, words)


def check_tool(script: Path, words: Sequence[str], reads: pytest.MonkeyPatch) -> None:
    """Reads the words of a program that is a file: it is run up to where its parser has read them."""
    assert script.is_file(), f"no file {script}"
    reads.setattr(sys, "argv", [str(script), *words])
    reads.syspath_prepend(str(script.parent))
    module = importlib.import_module(script.stem)
    with pytest.raises(Read):
        module.main()
    reads.undo()
