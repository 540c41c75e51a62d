"""What is installed: every package and data file is in the wheel, and the console script is there."""

import email
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.data.converting import picture

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy of what the wheel is made of: setuptools would leave build/ and *.egg-info in the checkout.
    source = folder / "source"
    made_of = ("pyproject.toml", "README.md", "LICENSE", "r1p_dist/**/*", "launchers/*/*", "ds_configs/*")
    for pattern in made_of:
        for path in ROOT.glob(pattern):
            if path.is_file() and "__pycache__" not in path.parts:
                copy = source / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source],
        check=True,
        timeout=500,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _expected(folder: str, pattern: str, inside: str) -> set[str]:
    found = {f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" for path in (ROOT / folder).glob(pattern)}
    assert found
    return found


def test_wheel_carries_every_module(names: set[str]) -> None:
    assert _expected("r1p_dist", "**/*.py", "r1p_dist") | {"r1p_dist/py.typed"} <= names


def test_wheel_carries_recipes_profiles_and_deepspeed_files(names: set[str]) -> None:
    assert _expected("launchers/recipes", "*.yaml", "r1p_dist/recipes") <= names
    assert _expected("ds_configs", "*.json", "r1p_dist/ds_configs") <= names
    assert _expected("launchers/clusters", "*.yaml", "r1p_dist/clusters") <= names


@pytest.mark.parametrize("asset", ["tiny", "moments", "mini_mtil", "serve"])
def test_wheel_carries_the_assets(asset: str, names: set[str]) -> None:
    files = [path for path in (ROOT / "r1p_dist/assets" / asset).rglob("*") if path.is_file()]
    assert files
    assert {path.relative_to(ROOT).as_posix() for path in files} <= names


def test_wheel_carries_licence_and_notice(names: set[str]) -> None:
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert any("/assets/NOTICE" in name for name in names)


@pytest.mark.slow
def test_the_wheel_alone_converts_trains_and_predicts(wheel: Path, tmp_path: Path) -> None:
    """In a folder outside of the checkout, with nothing of it to be found."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    for label, name in enumerate(("owl", "wren")):
        (tmp_path / "birds" / name).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "birds" / name / f"{number}.jpg").write_bytes(picture(10 * label + number, "JPEG", (64, 64)))
    train = "train --recipe mini_mtil stream=shards run_dir=run train.iterations=2 train.global_batch_size=4"
    commands = ["convert birds shards --test-share 0.25", train, "predict run birds/owl/0.jpg --json"]
    script = (
        "import sys; from r1p_dist import cli; assert cli.__file__.startswith(sys.argv[1]); "
        "sys.exit(sum(print('---', flush=True) or cli.main(words.split()) for words in sys.argv[2:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "site"), *commands],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=tmp_path,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    (prediction,) = json.loads(result.stdout.rpartition("---")[2])["pictures"]
    assert {entry["class"] for entry in prediction["classes"]} == {"owl", "wren"}
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["options"]["anchor"] == "tiny"


def test_wheel_declares_the_console_scripts(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        scripts = archive.read(entry).decode()
    assert "r1p = r1p_dist.cli:main" in scripts
    assert "r1p-submit = r1p_dist.cli:submit" in scripts


def test_every_dependency_has_a_lower_bound_that_the_tests_can_install(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    declared = [Requirement(line) for line in email.message_from_string(metadata).get_all("Requires-Dist")]
    bounds = {
        f"{requirement.name}=={bound.version}"
        for requirement in declared
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    assert len(bounds) == len({requirement.name for requirement in declared} - {"r1p-dist"})
    script = [sys.executable, ROOT / "tools/dev/lower_bounds.py"]
    assert set(subprocess.run(script, capture_output=True, text=True, check=True).stdout.split()) == bounds
