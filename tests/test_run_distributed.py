"""The fixture that runs a function on several ranks: results come back by rank, a rank's error fails the test."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException


def _sum_of_ranks(rank: int, world_size: int, offset: int) -> dict[str, object]:
    total = torch.tensor(rank + offset)
    torch.distributed.all_reduce(total)
    return {"total": total, "rank": rank}


def _fail_on_the_last_rank(rank: int, world_size: int) -> None:
    if rank == world_size - 1:
        raise RuntimeError("the last rank's reason")


def test_results_come_back_by_rank(run_distributed) -> None:
    assert run_distributed(_sum_of_ranks, 2, 5) == [{"total": torch.tensor(11), "rank": rank} for rank in range(2)]


def test_error_of_one_rank_fails_with_its_traceback(run_distributed) -> None:
    with pytest.raises(ProcessRaisedException, match="the last rank's reason"):
        run_distributed(_fail_on_the_last_rank, 2)


def _environment_and_threads_of_the_server(rank: int, world_size: int) -> dict[str, object]:
    (threads,) = re.findall(r"^Threads:\s*(\d+)", Path(f"/proc/{os.getppid()}/status").read_text(), re.MULTILINE)
    return {"set late": os.environ.get("R1P_SET_LATE"), "threads": int(threads), "cuda": torch.cuda.is_initialized()}


def test_ranks_have_the_tests_environment_and_a_server_with_one_thread(run_distributed, monkeypatch) -> None:
    """A fork copies one thread only, so locks that others hold would stay locked."""
    run_distributed(_environment_and_threads_of_the_server, 1)
    monkeypatch.setenv("R1P_SET_LATE", "here")
    found = run_distributed(_environment_and_threads_of_the_server, 1)
    assert found == [{"set late": "here", "threads": 1, "cuda": False}]
