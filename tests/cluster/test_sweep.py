"""Sweeps: alternatives, ranges, points, and those that a method has no option for."""

import itertools
import math
from pathlib import Path

import pytest

from r1p_dist.cluster.sweep import Sweep, SweepFile, make_points, point_name, split_alternatives
from r1p_dist.errors import InputError
from r1p_dist.recipes import load_config


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("8,12,16", ["8", "12", "16"]),
        ("[a,b]", ["[a,b]"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ("'x,y',z", ["'x,y'", "z"]),
        ("{a: 1, b: 2},{}", ["{a: 1, b: 2}", "{}"]),
        ("uniform(0, 1)", ["uniform(0, 1)"]),
        ("", [""]),
    ],
)
def test_only_commas_outside_of_brackets_and_quotes_split(text: str, parts: list[str]) -> None:
    assert split_alternatives(text) == parts


def test_a_grid_has_every_combination_and_lists_are_values() -> None:
    words = ["options.rank=8,12", "targets.towers=[image,text],[image]", "train.iterations=5", "tasks=[cars, fashion]"]
    sweep = Sweep.parse("mini_mtil_dac", words)
    expected = itertools.product(["8", "12"], ["[image,text]", "[image]"])
    assert [tuple(point.values()) for point in sweep.points()] == list(expected)
    assert sweep.overrides == ("train.iterations=5", "tasks=[cars, fashion]")


def test_points_have_their_own_folders_and_configurations(tmp_path: Path) -> None:
    points = make_points(
        Sweep.parse("mini_mtil_dac", ["options.rank=8,12", "seed=0,1", "train.iterations=7"]), tmp_path
    )
    assert [point.name for point in points] == [f"options.rank={r},seed={s}" for r in (8, 12) for s in (0, 1)]
    for point in points:
        assert point.config.run_dir == tmp_path / point.name and point.config.train.iterations == 7
    assert [(point.config.options["rank"], point.config.seed) for point in points] == [(8, 0), (8, 1), (12, 0), (12, 1)]


def test_points_are_evaluated_on_the_validation_split_unless_the_test_split_is_asked_for(tmp_path: Path) -> None:
    def splits(*words: str) -> list[str]:
        points = make_points(Sweep.parse("mini_mtil_dac", ["options.rank=8,12", *words]), tmp_path)
        return [point.config.data.evaluate_on for point in points]

    assert splits() == ["validation"] * 2
    assert splits("data.evaluate_on=test") == ["test"] * 2
    with pytest.raises(InputError, match=r"run_dir: every point of a sweep has its own; .* --folder"):
        splits("run_dir=runs/a")


def test_points_are_checked_before_they_are_submitted(tmp_path: Path) -> None:
    words = ["seed=0,1", "tasks=[fashoin]"]
    points = make_points(Sweep.parse("mini_mtil_dac", words), tmp_path)
    assert all("unknown task 'fashoin' (nearest: fashion)" in point.refused for point in points)
    points = make_points(Sweep.parse("mini_mtil_dac", ["train.global_batch_size=30,32"]), tmp_path, ranks=4)
    assert "train.global_batch_size=30 does not divide into 4 ranks" in points[0].refused
    assert points[1].refused is None


def test_points_without_a_use_are_refused_and_the_others_stay(tmp_path: Path) -> None:
    words = ["options.rank=4,8", "method=dac,zero_shot,dacc"]
    points = {point.name: point for point in make_points(Sweep.parse("mini_mtil_dac", words), tmp_path)}
    assert [name for name, point in points.items() if point.config] == ["options.rank=8,method=dac"]
    assert "options.active=8 must not be larger" in points["options.rank=4,method=dac"].refused
    assert "unknown key options.rank of method=zero_shot" in points["options.rank=8,method=zero_shot"].refused
    assert "method=dacc: no such method" in points["options.rank=8,method=dacc"].refused


def test_what_a_method_reads_itself_can_be_varied(tmp_path: Path) -> None:
    words = ["train.lr=1e-3,1e-2", "method=dac,lora,joint"]
    assert all(point.config for point in make_points(Sweep.parse("mini_mtil_dac", words), tmp_path))
    points = make_points(Sweep.parse("mini_mtil_dac", ["train.lr=1e-3,1e-2", "method=zero_shot"]), tmp_path)
    assert all("method=zero_shot trains nothing: train.lr makes" in point.refused for point in points)


def test_a_folder_with_another_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "seed=0").mkdir()
    other = load_config("mini_mtil_dac", ["train.iterations=9", "seed=0"])
    (tmp_path / "seed=0" / "config.yaml").write_text(other.dump())
    first, second = make_points(Sweep.parse("mini_mtil_dac", ["seed=0,1", "train.iterations=8"]), tmp_path)
    assert "train.iterations: 9 there, 8 here" in first.refused and second.refused is None


def test_random_points_are_drawn_from_the_ranges_and_do_not_move(tmp_path: Path) -> None:
    words = [
        "train.lr=loguniform(1e-4,1e-2)",
        "options.dropout=uniform(0,0.5)",
        "options.rank=integer(8,16)",
        "seed=0,1",
    ]
    points = Sweep.parse("mini_mtil_dac", words, samples=200, seed=3).points()
    assert points == Sweep.parse("mini_mtil_dac", words, samples=300, seed=3).points()[:200]
    assert points != Sweep.parse("mini_mtil_dac", words, samples=200, seed=4).points()
    rates = sorted(float(point["train.lr"]) for point in points)
    assert 1e-4 <= rates[0] and rates[-1] <= 1e-2
    assert abs(math.log10(rates[100]) + 3) < 0.25  # the median of a log-uniform is the geometric mean of its ends
    assert all(0 <= float(point["options.dropout"]) <= 0.5 for point in points)
    assert {int(point["options.rank"]) for point in points} == set(range(8, 17))
    assert {point["seed"] for point in points} == {"0", "1"}
    assert all(point.config for point in make_points(Sweep.parse("mini_mtil_dac", words, samples=3), tmp_path))


def test_a_random_sweep_over_alternatives_draws_each_point_once() -> None:
    points = Sweep.parse("mini_mtil_dac", ["seed=0,1,2", "options.rank=8,12"], samples=5).points()
    assert len({tuple(point.items()) for point in points}) == 5
    assert len(Sweep.parse("mini_mtil_dac", ["seed=0,1,2", "options.rank=8,12"], samples=50).points()) == 6


def test_a_file_says_the_same_as_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "recipe: mini_mtil_dac\noverrides: ['train.iterations=5']\nsamples: 4\nseed: 7\nparameters:\n"
        "  targets.towers: [[image], [image, text]]\n  options.dropout: [0.1, 0]\n  train.lr: loguniform(1e-4, 1e-2)\n"
    )
    from_file = Sweep.load(SweepFile.load(path))
    words = [
        'targets.towers=["image"],["image", "text"]',
        "options.dropout=0.1,0",
        "train.lr=loguniform(1e-4, 1e-2)",
        "train.iterations=5",
    ]
    assert from_file == Sweep.parse("mini_mtil_dac", words, samples=4, seed=7)
    assert all(point.config for point in make_points(from_file, tmp_path))


@pytest.mark.parametrize(
    ("words", "samples", "reason"),
    [
        (["seed=1"], None, "several values"),
        (["seed=1,1"], None, "same value twice"),
        (["seed=1,2", "seed=3,4"], None, "varied twice"),
        (["train.lr=uniform(1,2)"], None, "--samples"),
        (["train.lr=uniform(2,1)"], 3, "smaller"),
        (["train.lr=loguniform(0,1)"], 3, "positive"),
        (["train.lr=uniform(a,1)"], 3, "two numbers"),
        (["options.rank=integer(1.5,3)"], 3, "whole numbers"),
    ],
)
def test_what_is_wrong_is_named(words: list[str], samples: int | None, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Sweep.parse("mini_mtil_dac", words, samples).points()


@pytest.mark.parametrize("content", ["recipe: mini_mtil", "recipe: a\nparameters: {}\nsample: 3", "[]", "a: b: c"])
def test_a_wrong_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match="sweep.yaml"):
        SweepFile.load(path)


def test_names_of_points_are_harmless_and_differ() -> None:
    assert point_name({"options.rank": "8", "seed": "0"}) == "options.rank=8,seed=0"
    names = {point_name({"backbone.pretrained": path}) for path in ("/a/b", "/a_b", "../a/b", "x" * 300, "x" * 301)}
    assert len(names) == 5 and all(len(name) <= 120 and "/" not in name for name in names)
