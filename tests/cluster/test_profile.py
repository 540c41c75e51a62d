"""Cluster profiles: what a user writes down once, and the flags laid over it."""

from pathlib import Path

import pytest

from r1p_dist.cluster.profile import ClusterProfile, minutes_of
from r1p_dist.errors import InputError


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("90", 90),
        ("90:00", 90),
        ("1:30:00", 90),
        ("0:00:01", 1),
        ("24:00:00", 1440),
        ("2-0", 2880),
        ("1-06:30", 1830),
        ("1-06:30:30", 1831),
    ],
)
def test_times_are_read_as_slurm_reads_them(time: str, minutes: int) -> None:
    assert minutes_of(time) == minutes


def test_flags_lie_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('partition: gpu\ngpus_per_node: 8\ntime: "2:00:00"\nslurm: {qos: high, mem: 10G}\n')
    flags = {"nodes": 2, "partition": None, "time": "30", "slurm": {"qos": "low"}, "signal_delay_s": 60}
    profile = ClusterProfile.load(str(path), flags)
    assert (profile.partition, profile.nodes, profile.minutes) == ("gpu", 2, 30)
    assert profile.slurm == {"qos": "low", "mem": "10G"}
    assert profile.ranks_per_node == 8 and profile.world_size == 16


def test_times_and_names_are_those_that_stand_there(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text, minutes in (("24:00:00", 1440), ("1:30:00", 90), ("90", 90), ("1-12", 2160)):
        path.write_text(f"time: {text}\nslurm: {{reservation: 007, kill-on-invalid-dep: no}}")
        profile = ClusterProfile.load(str(path), {})
        assert profile.minutes == minutes
        assert profile.slurm == {"reservation": "007", "kill-on-invalid-dep": "no"}


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        ("tim: '1:00:00'", {}, ["mine.yaml", "tim=", "did you mean time?"]),
        ("qos: high", {}, ["mine.yaml", "qos=", "under slurm:"]),
        ("time: 24:00:90:00", {}, ["mine.yaml", "time='24:00:90:00'", "hours:minutes:seconds"]),
        ("nodes: 010", {}, ["mine.yaml", "nodes='010'", "valid integer"]),
        ("time: '1 hour'", {}, ["mine.yaml", "time='1 hour'", "hours:minutes:seconds"]),
        ("nodes: 2", {"nodes": 0}, ["command line", "nodes=0"]),
        ("- nodes", {}, ["mine.yaml", "mapping"]),
        ("time: '5'", {}, ["signal_delay_s=300", "shorter than time=5"]),
        ("cluster: local", {"nodes": 2}, ["nodes=2", "one node"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: str, flags: dict, words: list[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        ClusterProfile.load(str(path), flags)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_an_unknown_profile_is_named_with_those_there_are() -> None:
    with pytest.raises(InputError, match="did you mean loopback"):
        ClusterProfile.load("lopback", {})
