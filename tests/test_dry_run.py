"""`r1p dry-run`: rank 0 of N alone takes what rank 0 of N takes, says what it is not, and leaves nothing behind."""

import json
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension  # says once that there is no GPU, which is no line of ours

from r1p_dist.cli import main
from r1p_dist.distributed import CollectiveCounter, fake_ranks, gather_bytes, sum_over_ranks, world_size
from r1p_dist.dry_run.probe import by_kind
from r1p_dist.recipes import load_config
from r1p_dist.storage_meter import StorageMeter


def test_fake_ranks_hold_what_this_one_holds_and_go_away() -> None:
    for ranks in (3, 4096):
        with fake_ranks(ranks):
            assert world_size() == ranks
            assert sum_over_ranks(torch.tensor([5])).tolist() == [5]
            assert gather_bytes(b"own") == [b"own"] * ranks
    assert world_size() == 1


def test_collectives_are_counted_under_their_usual_names() -> None:
    with fake_ranks(4), CollectiveCounter() as counter:
        part, whole = torch.zeros(2), torch.zeros(8)
        torch.distributed.all_gather(list(whole.chunk(4)), part)
        torch.distributed.broadcast(part, 0)
        sum_over_ranks(whole)
    assert by_kind(counter.summary()) == {
        "all_gather": {"calls": 1, "bytes": 32},
        "all_reduce": {"calls": 1, "bytes": 32},
        "broadcast": {"calls": 1, "bytes": 8},
    }


def test_meter_follows_tensors_as_they_come_and_go() -> None:
    with StorageMeter() as meter:
        a = torch.zeros(1000)
        b = a[10:] + 1
        view = b[:5]
        assert meter.live == 4 * (1000 + 990)
        del a, b
        assert meter.live == 4 * 990, "the view keeps it"
        assert meter.take_peak() == 4 * (1000 + 990)
        del view
        assert (meter.live, meter.take_peak()) == (0, 4 * 990)


WORDS = [
    "options.vote=lagged",
    "evaluation.batch_size=8",
    "deepspeed.overrides.zero_optimization.reduce_bucket_size=500000",
]


def _two_real_ranks(rank: int, ranks: int, folder: str, toy: list[str]) -> list[dict[str, dict[str, int]]]:
    """Trains with two real ranks and returns the collectives that the run noted, by their usual names."""
    from r1p_dist.train import run

    overrides = [
        *WORDS,
        *toy,
        f"run_dir={folder}",
        "tasks=[country_flags]",
        "train.iterations=3",
        "checkpoint.every_steps=null",
    ]
    return by_kind(run(load_config("mini_mtil_smoke", overrides))["collectives_per_step"])


@pytest.fixture(scope="module")
def dry_run(toy: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict, str]:
    """The command for two ranks: the files that it left where it ran, its JSON, and what it printed."""
    folder = tmp_path_factory.mktemp("dry")
    words = ["--recipe", "mini_mtil_smoke", *WORDS, *toy, "tasks=[country_flags]", "run_dir=nothing"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        patch.chdir(folder)
        assert main(["dry-run", "--ranks", "2", "--json", str(folder / "dry.json"), *words]) == 0
    return [path.name for path in folder.iterdir()], json.loads((folder / "dry.json").read_text()), out.getvalue()


def test_command_prints_what_it_counted_and_leaves_nothing(dry_run: tuple[list[str], dict, str]) -> None:
    files, found, printed = dry_run
    assert files == ["dry.json"]
    assert list(found["phases"]) == ["loading", "step", "save", "evaluation", "boundary"]
    assert found["global_batch_size"] == 32 and found["batch"]["samples"] == 16
    for phase in found["phases"].values():
        memory = Counter(phase["memory"])
        total = memory.pop("total")
        assert total == memory.total() >= memory["weights"] > 0
    assert "Rank 0 of 2, alone" in printed and "Nothing was sent" in printed and "meaningless" in printed


@pytest.mark.slow
def test_a_step_is_that_of_real_ranks(run_distributed, toy: list[str], dry_run, tmp_path: Path) -> None:
    real, other = run_distributed(_two_real_ranks, 2, str(tmp_path / "real"), toy, timeout_s=1100)
    assert real == other == dry_run[1]["phases"]["step"]["collectives"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ranks", "0"], "--ranks 0: must be from 1"),
        (["--ranks", "8", "--batch", "0"], "--batch 0: must be from 1"),
        (["--ranks", "64"], "--ranks 64: train.global_batch_size=32 does not divide into 64 ranks"),
        (["--ranks", "x"], "invalid int value: 'x'"),
        (["--ranks", "8", "train.lr"], "'train.lr' is not an override"),
        (["--ranks", "8", "--bach", "2"], "unrecognized arguments: --bach"),
        (["--ranks", "8", "method=zero_shot"], "method=zero_shot: trains nothing"),
        (["--ranks", "8", "--recipe", "mini_mtl"], "did you mean mini_mtil?"),
    ],
)
def test_wrong_input_is_one_line(capsys, words: list[str], message: str) -> None:
    assert main(["dry-run", "--recipe", "mini_mtil", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
