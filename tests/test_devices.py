"""Which device a rank takes, and that DeepSpeed takes the same; the devices are faked, no driver is asked."""

import os

import pytest
import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from r1p_dist import engine
from r1p_dist.engine import start_process_group
from r1p_dist.errors import InputError


@pytest.fixture
def start(monkeypatch):
    """Return start(visible devices, LOCAL_RANK) -> (our device, the one set, DeepSpeed's when the group is made)."""

    def run(visible: int, local_rank: int) -> tuple[str, list[int], list[str]]:
        chosen: list[int] = []
        seen: list[str] = []
        for name, value in {"RANK": 7, "WORLD_SIZE": 8, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 4}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: visible > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: visible)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)

        def init_distributed(**_) -> None:
            # as DeepSpeed's process group and its partitioning of parameters name the device
            seen.append(CUDA_Accelerator().device_name(os.environ["LOCAL_RANK"]))

        monkeypatch.setattr(engine.deepspeed, "init_distributed", init_distributed)
        return str(start_process_group()), chosen, seen

    return run


@pytest.mark.parametrize(
    ("visible", "local_rank", "index"),
    [
        pytest.param(4, 3, 3, id="all devices of the node"),
        pytest.param(1, 3, 0, id="its own alone"),
        pytest.param(2, 1, 1, id="two of its own"),
        pytest.param(1, 0, 0, id="the only one"),
    ],
)
def test_a_rank_and_deepspeed_take_the_same_device(start, visible: int, local_rank: int, index: int) -> None:
    assert start(visible, local_rank) == (f"cuda:{index}", [index], [f"cuda:{index}"])


def test_a_rank_without_a_device_is_told_so_before_the_group_waits_for_it(start) -> None:
    with pytest.raises(InputError, match="LOCAL_RANK=2: this rank sees 2 devices and none is left for it; start at"):
        start(2, 2)


def test_ranks_without_devices_keep_their_number(start) -> None:
    device, chosen, _ = start(0, 3)
    assert (device, chosen, os.environ["LOCAL_RANK"]) == ("cpu", [], "3")
