"""`r1p config` and docs/configuration.md, from the typed tree."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from r1p_dist.config import RunConfig
from r1p_dist.config_command import main
from r1p_dist.config_reference import sections
from r1p_dist.errors import InputError
from r1p_dist.safe_yaml import parse_yaml
from tests.documents import imported_tool

ROOT = Path(__file__).parents[1]
KEYS = [key for section in sections() for key in section.keys]


@pytest.fixture
def tool() -> Iterator[ModuleType]:
    yield from imported_tool("write_configuration_page")


def test_every_key_has_a_meaning_and_the_default_that_a_run_gets() -> None:
    run = RunConfig(run_dir="somewhere").flat()
    named = {key.name: key for key in KEYS}
    # what null stands for is filled in for the kind of backbone
    assert named.keys() == run.keys()
    for name, key in named.items():
        assert key.meaning.endswith("."), f"{name} says nothing"
        if name not in ("run_dir", "targets.towers", "targets.layers"):
            assert parse_yaml(key.default, name) == run[name]
    assert named["run_dir"].default == "" and named["targets.layers"].default == "null"
    assert named["train.precision"].choices == ("auto", "fp32", "bf16")
    assert all(section.meaning for section in sections())


def test_one_key_or_a_section_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("r1p config", ["checkpoint"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("checkpoint.every_steps=100  Steps from") and second.startswith(
        "checkpoint.keep=2  How many"
    )
    assert main("r1p config", ["train.lr"]) == 0
    assert capsys.readouterr().out.startswith("train.lr=0.002  The highest")
    assert main("r1p config", []) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(KEYS)


def test_a_wrong_key_names_the_near_one() -> None:
    with pytest.raises(InputError, match=r"no key data.shot; did you mean data.shots\?"):
        main("r1p config", ["data.shot"])
    with pytest.raises(InputError, match=r"no key learning_rate; did you mean train.lr\?"):
        main("r1p config", ["learning_rate"])


def test_the_page_says_what_the_keys_say_now(tool: ModuleType) -> None:
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run python tools/dev/write_configuration_page.py"
