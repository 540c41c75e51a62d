"""The fixture that runs a function on several ranks: results come back by rank, a rank's error fails the test."""

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
