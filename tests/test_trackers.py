"""Trackers against what the services themselves read back, and a run that outlives one that fails."""

import json
import logging
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from r1p_dist.config import RunConfig
from r1p_dist.errors import InputError
from r1p_dist.trackers import TrackedRun, Trackers, check_trackers, trackers
from tests.data.test_peers import folder_of_peers, run_python

ROOT = Path(__file__).parents[1]

STAGES = {"flags": 4, "cards": 6}
SETTINGS = {"seed": 3, "train.lr": 1e-2, "method": "dac", "tasks": None, "targets.towers": ["image", "text"]}
STEPS = [("flags", 2, {"loss": 3.0, "lr": 0.5}), ("flags", 4, {"loss": 2.0, "lr": 0.25}), ("cards", 6, {"loss": 1.0})]
FIRST = {
    "tasks": ["flags", "cards"],
    "metric": ["accuracy", None],
    "accuracy": [[10.0, 20.0], [50.0, 25.0]],
    **dict.fromkeys(("average", "last", "bwt", "forgetting"), None),
    "transfer": 25.0,
}
WHOLE = FIRST | {"accuracy": [*FIRST["accuracy"], [40.0, 80.0]], "average": 49.0, "last": 60.0, "bwt": -10.0}
WHOLE |= {"forgetting": 10.0}
# name -> [(step over the stream, value)]
EXPECTED = {
    "train/loss": [(2, 3.0), (4, 2.0), (10, 1.0)],
    "train/lr": [(2, 0.5), (4, 0.25)],
    "accuracy/flags": [(4, 50.0), (10, 40.0)],
    "accuracy/cards": [(4, 25.0), (10, 80.0)],
    "stream/transfer": [(4, 25.0), (10, 25.0)],
    "stream/average": [(10, 49.0)],
    "stream/last": [(10, 60.0)],
    "stream/bwt": [(10, -10.0)],
    "stream/forgetting": [(10, 10.0)],
}


def show(name: str, folder: Path) -> None:
    """Shows a run in two processes' lives: one that ends after the first stage, one that resumes there."""
    for done, steps, metrics in ((0, STEPS[:2], FIRST), (4, STEPS[2:], WHOLE)):
        run = TrackedRun("first", "mini_mtil", SETTINGS, done, folder)
        shown = Trackers([name], run, STAGES)
        for step in steps:
            shown.step(*step)
        for _ in range(2):  # a run writes its metrics once more at its end
            shown.metrics(metrics)
        shown.close()


def test_tensorboard_has_curves_the_matrix_and_the_settings(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG

    show("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    summary = {f"stream/{name}": (0, WHOLE[name]) for name in ("transfer", "average", "last", "forgetting")}
    for name, last in summary.items():  # the values that HPARAMS shows beside the settings
        assert found[name].pop() == last
    assert found == EXPECTED
    assert [image.step for image in events.Images("accuracy_matrix")] == [4, 10]
    assert SESSION_START_INFO_TAG in events.PluginTagToContent("hparams")


def test_what_a_killed_process_wrote_too_much_is_hidden(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, value in ((0, 7.0), (4, 1.0)):
        shown = Trackers(["tensorboard"], TrackedRun("a", "s", {}, done, tmp_path), STAGES)
        shown.step("cards", 2, {"loss": value})
        shown.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(6, 1.0)]


# prints the run's identity, and of each file its name and what `read_wandb` returns
READ_WANDB = """
import json, sys
from pathlib import Path
from tests.test_trackers import read_wandb, show
folder = Path(sys.argv[1])
show("wandb", folder)
files = sorted((folder / "wandb/wandb").glob("offline-run-*/*.wandb"))
print(json.dumps([(folder / "wandb/identity").read_text(), [(file.name, *read_wandb(file)) for file in files]]))
"""


def test_wandb_offline_has_one_run_with_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "of_the_test")
    monkeypatch.chdir(tmp_path)
    known, files = json.loads(run_python(READ_WANDB, tmp_path, path=(folder_of_peers("trackers"), ROOT)))
    found: dict[str, list] = {}
    assert len(files) == 2
    for name, names, settings, rows in files:
        assert name == f"run-{known}.wandb" and names == ["of_the_test", "first", "mini_mtil"]
        assert {key: settings[key] for key in SETTINGS} == SETTINGS
        for row in rows:
            for key in row.keys() & EXPECTED.keys():
                found.setdefault(key, []).append((row["_step"], row[key]))
    assert found == EXPECTED


def read_wandb(file: Path) -> tuple[list[str], dict[str, Any], list[dict[str, Any]]]:
    """Returns project, name and group of an offline run's file, its settings, and its history."""
    from wandb.proto import wandb_internal_pb2

    kinds: dict[str, list[Any]] = {}
    for _ in range(600):  # a process of W&B's own writes the end of it a little later
        kinds = {}
        for data in log_records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            kinds.setdefault(record.WhichOneof("record_type"), []).append(record)
        if "exit" in kinds:
            break
        time.sleep(0.1)
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in kinds["history"]
    ]
    run = kinds["run"][0].run
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    return [run.project, run.display_name, run.run_group], settings, rows


def log_records(content: bytes) -> Iterator[bytes]:
    """Yields the records of a LevelDB log: blocks of 32 KiB, in them parts with checksum, length and kind.

    W&B writes seven bytes of its own before the first.
    """
    place, record = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # a block's rest that holds no part
            place += 32768 - place % 32768
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


# prints the run's name, state, settings and the history of each number
READ_MLFLOW = """
import json, sys
from pathlib import Path
from tests.test_trackers import show
show("mlflow", Path(sys.argv[1]))
from mlflow.tracking import MlflowClient
client = MlflowClient()
(run,) = client.search_runs([client.get_experiment_by_name("mini_mtil").experiment_id])
points = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
history = {name: [(point.step, point.value) for point in found] for name, found in points.items()}
print(json.dumps([run.info.run_name, run.info.status, run.data.params, history]))
"""


def test_mlflow_has_one_run_with_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of_peers("trackers")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.chdir(tmp_path)
    name, status, settings, history = json.loads(run_python(READ_MLFLOW, tmp_path, path=(folder, ROOT)))
    assert (name, status) == ("first", "FINISHED")
    assert settings == {key: str(value) for key, value in SETTINGS.items()}
    assert {key: [tuple(point) for point in points] for key, points in history.items()} == EXPECTED


class Failing:
    """A service that is gone after the first line."""

    def __init__(self, run: TrackedRun) -> None:
        self.calls = 0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.calls += 1
        raise ConnectionError("no route to\nhost")

    def close(self, metrics: Mapping[str, Any] | None) -> None:
        raise AssertionError("is not asked again")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(trackers._KNOWN, "failing", (__name__, "Failing", "pytest"))
    monkeypatch.setitem(trackers._KNOWN, "absent", (__name__, "Failing", "a_package_that_nobody_has"))
    yield


def test_one_that_fails_is_a_warning_and_the_others_go_on(
    failing: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = TrackedRun("a", "s", {}, 0, tmp_path)
    with caplog.at_level(logging.WARNING):
        shown = Trackers(["failing", "tensorboard"], run, STAGES)
        shown.step("flags", 1, {"loss": 1.0})
        shown.step("flags", 2, {"loss": 2.0})
        shown.close()
    (record,) = caplog.records
    assert record.getMessage() == "log.trackers: failing shows this run no more: ConnectionError: no route to host"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [1.0, 2.0]


def test_one_that_is_not_installed_ends_a_run_before_it_begins(failing: None) -> None:
    check_trackers(["failing"])
    with pytest.raises(
        InputError, match=r"log.trackers=absent: the package a_package_that_nobody_has is not installed"
    ):
        check_trackers(["absent"])


def test_a_recipe_takes_known_ones_alone() -> None:
    assert RunConfig.load("mini_mtil_dac", ["log.trackers=[wandb, mlflow]"]).log.trackers == ("wandb", "mlflow")
    with pytest.raises(InputError, match="log.trackers"):
        RunConfig.load("mini_mtil_dac", ["log.trackers=[comet]"])
    with pytest.raises(InputError, match="did you mean log.trackers"):
        RunConfig.load("mini_mtil_dac", ["log.tensorboard=true"])
