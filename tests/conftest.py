"""What all tests share: one thread, no hub, a way to run a function on several ranks, and small models and streams."""

import os

# Before torch is imported: several ranks share the cores, and no test may reach for a hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import multiprocessing
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests import browser

# Ranks are forked from a server that imported these once: several CPU seconds per rank otherwise. None of them may
# start a thread or touch an accelerator when it is imported (test_run_distributed.py looks).
PRELOADED = [
    "pytest",
    "r1p_dist.train",
    "r1p_dist.report.write",
    "tests.small_clip",
    "tests.small_llava",
    "torch.utils.cpp_extension",
]
multiprocessing.set_forkserver_preload(PRELOADED)
# Files that take longest, in that order: what starts last must not leave one process alone at the end.
LONGEST = (
    "methods/test_conformance.py",
    "planner/test_collectives.py",
    "test_llava_parity.py",
    "test_resume.py",
    "test_interrupts.py",
    "test_parity.py",
    "planner/test_memory.py",
    "test_endings.py",
    "test_gpu_check.py",
    "test_chaos.py",
    "test_llava_run.py",
    "test_train.py",
)
# what start_process_group sets where no launcher has
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ByFile(LoadScopeScheduling):
    """Gives the tests of a file to one process, for they share fixtures; those of SLURM too, for there is one cluster.

    pytest-xdist's own `loadgroup` marks a test's name, which pytest 9.2 no longer shows it.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "slurm" if nodeid.startswith("tests/slurm/") else nodeid.split("::", 1)[0]


@pytest.hookimpl(optionalhook=True)  # `pytest -p no:xdist` has no such hook
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests: SLURM's start first, for they mostly wait; then the longest files, then
    those with most slow tests."""
    if not hasattr(config, "workerinput"):
        return
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in places)
    items.sort(
        key=lambda item: (
            item.path.parent.name != "slurm",
            places.get(item.path, len(places)),
            -slow[item.path],
            item.path,
        )
    )


@pytest.fixture(scope="module")
def tab() -> Iterator[browser.Tab]:
    """One browser for all pages of a module. R1P_BROWSER=1: fail where there is none."""
    if browser.PROGRAM is None and not os.environ.get("R1P_BROWSER"):
        pytest.skip("needs Chromium: apt install chromium")
    with browser.browser() as found:
        yield found


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported stays: DeepSpeed collects garbage for every engine, and would look through all of it."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def fresh_compiled_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What torch compiles is kept for this session alone: a test must not pass by what an earlier one left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="module", autouse=True)
def no_shared_memory_left() -> Iterator[None]:
    """Ranks that are killed leave DeepSpeed's shared buffers, 69 MB each; those of tests that run now are younger."""
    yield
    for buffer in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"):
        with suppress(OSError):
            if time.time() - buffer.stat().st_mtime > 1200:
                buffer.unlink()


@pytest.fixture(scope="module", autouse=True)
def no_process_group_left() -> Iterator[None]:
    """What runs in a test's own process leaves its group of one rank, and in the environment that it is a rank, which a
    program that a later file starts would believe; a file must not depend on those before it."""
    before = {name: os.environ.get(name) for name in OF_A_RANK}
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        from r1p_dist.distributed import end_process_group

        end_process_group()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def run_distributed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Return run(function, world_size, *args, timeout_s=900, new_interpreter=False) -> results by rank.

    `function(rank, world_size, *args)` must stand at the top level of its module. It runs in a process per rank with
    the launcher's environment and a gloo process group. Its results are tensors, numbers, strings, and lists and dicts
    of them. A rank that raises fails the test with that rank's traceback; so does a run past `timeout_s`.

    new_interpreter: start Python anew on each rank instead of forking a server that has imported everything; for what
    measures memory or depends on variables that are read when a process starts.
    """

    def run(
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_s: float = 900,
        new_interpreter: bool = False,
    ) -> list[Any]:
        import torch

        # drivers of accelerators do not survive a fork
        is_forked = not new_interpreter and not torch.accelerator.is_available()

        folder = tmp_path_factory.mktemp("ranks")
        # bound here, so that no port is looked for first and taken by another program before it is used
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = torch.multiprocessing.start_processes(
            _run_rank,
            args=(function, world_size, store.port, timeout_s, folder, dict(os.environ), args),
            nprocs=world_size,
            join=False,
            start_method="forkserver" if is_forked else "spawn",
        )
        deadline = time.monotonic() + timeout_s
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    pytest.fail(f"{function.__name__} on {world_size} ranks took more than {timeout_s} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]

    return run


def _run_rank(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    port: int,
    timeout_s: float,
    folder: Path,
    environment: dict[str, str],
    args: tuple,
) -> None:
    gc.freeze()  # DeepSpeed collects for every engine, and would look through all that the server has imported
    os.environ.clear()  # the server has that of its own start
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=timeout_s))
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )
    torch.save(function(rank, world_size, *args), folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port for the rendezvous of a launcher's ranks; bound until the test ends, so that no other program gets it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store: both may bind, one may listen
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of the recipe `mini_mtil_dac` with which a whole run takes a quarter of the time (tests/toy_run.py)."""
    from tests.toy_run import write_toy

    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def shallow_toy(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same with one block per tower, where runs are compared bit for bit: ZeRO-3 takes its time per module."""
    from tests.toy_run import BLOCKS, write_toy

    return write_toy(tmp_path_factory.mktemp("shallow"), dict.fromkeys(BLOCKS, (0,)))
