"""Samples per second and what travels in a step, for several numbers of ranks and each vote mode.

The global batch is the same for all numbers of ranks, one thread each. The runs of a round follow one another, rounds
are repeated; the medians are printed. `collectives` are those of one step of one rank, DeepSpeed's too, with the bytes
of the whole tensors. More ranks than cores only show that it works.
"""

import argparse
import os
import socket
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import processor
from benchmarks.models import CLASSES, random_images
from r1p_dist.backbones import load_backbone
from r1p_dist.distributed import CollectiveCounter
from r1p_dist.engine import TaskEngine
from r1p_dist.methods import make_method
from r1p_dist.recipes import load_config


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns per vote mode and number of ranks the samples per second and the collectives of a step."""
    seconds: dict[tuple[str, int], list[float]] = {}
    collectives = {}
    for _ in range(arguments.rounds):
        for vote in arguments.votes:
            for ranks in arguments.ranks:
                result = _run_ranks(arguments, vote, ranks)
                seconds.setdefault((vote, ranks), []).append(result["seconds"])
                collectives[vote, ranks] = result["collectives"]
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "model": arguments.model,
        "batch": arguments.batch,
        "zero_stage": arguments.zero,
        "samples_per_second": {
            vote: {
                ranks: round(arguments.batch / statistics.median(seconds[vote, ranks]), 1) for ranks in arguments.ranks
            }
            for vote in arguments.votes
        },
        "collectives": {
            vote: {ranks: collectives[vote, ranks] for ranks in arguments.ranks if ranks > 1}
            for vote in arguments.votes
        },
    }


def _run_ranks(arguments: argparse.Namespace, vote: str, ranks: int) -> dict[str, Any]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_train, args=(arguments, vote, ranks, port, results), nprocs=ranks)
    return results.get()


def _train(rank: int, arguments: argparse.Namespace, vote: str, ranks: int, port: int, results: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = load_config(
        "mini_mtil_dac",
        [
            f"backbone.name={arguments.model}",
            f"train.global_batch_size={arguments.batch}",
            f"options.vote={vote}",
            f"deepspeed.config=zero{arguments.zero}",
        ],
    )
    backbone = load_backbone(config.backbone)
    method = make_method(config, backbone)
    method.prepare(0)
    prepare = backbone.preparer([f"a photo of a {name}." for name in CLASSES])
    engine = TaskEngine(backbone, config, config.train, ranks)
    backbone.train()
    generator = torch.Generator().manual_seed(rank)
    batch = {
        "image": random_images(backbone, arguments.batch // ranks, generator),
        "label": torch.randint(len(CLASSES), (arguments.batch // ranks,), generator=generator),
    }

    def step() -> None:
        engine.step(method.loss(engine, prepare(batch))[0])
        method.after_step(None)

    step()  # a lagged vote is a global one in the first step
    with CollectiveCounter() as counter:
        step()
    dist.barrier()
    started = time.perf_counter()
    for _ in range(arguments.steps):
        step()
    dist.barrier()
    if rank == 0:
        results.put({"seconds": (time.perf_counter() - started) / arguments.steps, "collectives": counter.summary()})
    dist.destroy_process_group()
