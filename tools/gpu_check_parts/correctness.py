"""Part a: a run on the card against the same run on the CPU, fp32 without TF32, for every stage of ZeRO.

The reference is a run of two tasks of the small CLIP on the CPU, without ZeRO. A run agrees with it when all votes and
the merged experts are the same, losses differ by no more than LOSS and merged updates by no more than UPDATE, relative.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import deepspeed
import torch
from big_model_check import write_stream
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

from gpu_check_parts.case import NotPossibleError, Report, end, free_port, last, start
from r1p_dist.checkpoint.folders import read_tensors
from r1p_dist.recipes import load_config
from r1p_dist.train import run

TASKS = ("fashion", "country_flags")
SETTINGS = "train.precision=fp32 train.global_batch_size=4 log.every_steps=1 checkpoint.every_steps=1 checkpoint.keep=9"
STEPS = 3
# Another device rounds otherwise, and AdamW's first steps make signs of what is near zero.
LOSS, UPDATE = 1e-4, 1e-3
# What gloo, nccl and torch say of what they cannot do, rather than of a fault.
CANNOT = ("not supported", "unsupported", "no support", "not implemented", "invalid backend", "duplicate gpu")


def reference(report: Report) -> None:
    """Trains the run that all others are held against."""
    # what CPU ranks of one node exchange their sums with: compiled for up to a minute, and one rank has no use for it
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    make_stream(report.folder)
    train(report.folder, "reference", ["deepspeed.config=zero0"])


def stages(report: Report, stages: Sequence[int]) -> None:
    """Trains with each stage of ZeRO, on one rank, and compares."""
    for stage in stages:
        train(report.folder, f"zero{stage}", [f"deepspeed.config=zero{stage}"])
        _compare(report, f"zero{stage}")


def resume(report: Report) -> None:
    """Goes on from a checkpoint in the middle of the first task, with dropout, and compares the bits with those of the
    run that was not stopped: with torch's deterministic algorithms, and on a card with those that it takes by itself,
    where attention's backward may add in any order."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when the first product runs
    if report.device == "cuda":
        report.figures("resume, any algorithms", **_resumed(report.folder, "any"))
    torch.use_deterministic_algorithms(True)
    figures = _resumed(report.folder, "deterministic")
    report.check("resume bit for bit", figures["equal_tasks"] == len(TASKS), **figures)


def _resumed(folder: Path, name: str) -> dict[str, int]:
    """Returns in how many tasks a run and one that was resumed merged the same bits."""
    settings = ["deepspeed.config=zero2", "options.dropout=0.2"]
    whole = train(folder, f"{name}-whole", settings)
    point = whole / "checkpoints" / f"00-{TASKS[0]}" / f"step-{STEPS - 1}"
    resumed = train(folder, f"{name}-resumed", [*settings, f"resume={point}"])
    files = [f"adapters/{index:02d}-{task}/adapter.safetensors" for index, task in enumerate(TASKS)]
    equal = sum((whole / file).read_bytes() == (resumed / file).read_bytes() for file in files)
    return {"equal_tasks": equal, "tasks": len(TASKS)}


def quick(report: Report) -> None:
    """Does the most of it in one process, which can be the reference's where there is no card."""
    if report.device != "cpu":
        raise NotPossibleError("the reference needs a process without the card; leave out --quick")
    reference(report)
    stages(report, [3])
    resume(report)


def two_ranks(report: Report, stages: Sequence[int]) -> None:
    """Trains on two ranks that share the card, over gloo, and compares."""
    port = free_port()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # each rank sees this one alone
    ranks, logs = [], [report.folder / f"two_ranks-{rank}.txt" for rank in range(2)]
    for rank, log in enumerate(logs):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": visible}
        call = {"name": f"rank {rank}", "path": os.devnull, "folder": str(report.folder), "device": report.device}
        call |= {"quick": report.quick, "limit_s": report.seconds_left}
        values = {name: str(value) for name, value in environment.items()}
        ranks.append(start("gpu_check_parts.correctness:one_of_two", call, {"stages": list(stages)}, log, values))
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        time.sleep(0.2)
    for rank in ranks:  # the other one would wait for a rank that failed
        end(rank)
    for stage in stages:
        if len(_merged(report.folder / f"two-ranks-zero{stage}")) == len(TASKS):
            _compare(report, f"two-ranks-zero{stage}")
    failed = next((log for rank, log in zip(ranks, logs, strict=True) if rank.returncode > 0), None)
    if failed is not None:
        reason = f"two ranks on one card: {last(failed.read_text(errors='replace').splitlines())}"
        raise (NotPossibleError if any(word in reason.lower() for word in CANNOT) else RuntimeError)(reason)


def one_of_two(report: Report, stages: Sequence[int]) -> None:
    """One of the two ranks."""
    # DeepSpeed takes over a group that is there; nccl, its own choice, refuses two ranks on one card
    torch.distributed.init_process_group("gloo")
    for stage in stages:
        train(report.folder, f"two-ranks-zero{stage}", [f"deepspeed.config=zero{stage}"])


def make_stream(folder: Path) -> None:
    """Writes the stream that `train` trains on, where no part has yet."""
    if not (folder / "stream").is_dir():
        write_stream(folder / "stream", "mini_mtil", TASKS)


def train(folder: Path, name: str, settings: Sequence[str]) -> Path:
    """Trains, in fp32 without TF32 unless the settings say otherwise; returns the folder of the run."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # which is on by default, for the patches' convolution
    own = [f"stream={folder / 'stream' / 'stream.yaml'}", f"run_dir={folder / name}", f"train.iterations={STEPS}"]
    run(load_config("mini_mtil_dac", [*SETTINGS.split(), *own, *settings]))
    return folder / name


def _compare(report: Report, name: str) -> None:
    ours, theirs = report.folder / name, report.folder / "reference"
    loss = apart(ours, theirs)
    votes = _different_votes(ours, theirs)
    update = 0.0
    for merged, expected in zip(_merged(ours), _merged(theirs), strict=True):
        for layer in {key.rpartition(".")[0] for key in expected}:
            delta, right = (tensors[f"{layer}.B"] @ tensors[f"{layer}.A"] for tensors in (merged, expected))
            update = max(update, float((delta - right).norm() / right.norm()))
    passed = votes == 0 and loss <= LOSS and update <= UPDATE  # false for a NaN
    report.check(name, passed, loss=loss, update=update, different_votes=votes)


def apart(ours: Path, theirs: Path) -> float:
    """Returns by how much the logged losses of two runs differ at most, relative."""
    return max(abs(a - b) / abs(b) for a, b in zip(_losses(ours), _losses(theirs), strict=True))


def _losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "log.jsonl").read_text().splitlines()]


def _merged(run_dir: Path) -> list[dict[str, torch.Tensor]]:
    """Returns the merged experts of each task."""
    return [read_tensors(file) for file in sorted(run_dir.glob("adapters/*/adapter.safetensors"))]


def _different_votes(ours: Path, theirs: Path) -> int:
    """Returns how many counts of votes differ, over all experts, layers, tasks and steps."""
    different = 0
    for file in sorted(theirs.glob("checkpoints/*/step-*/method.safetensors")):
        expected, found = read_tensors(file), read_tensors(ours / file.relative_to(theirs))
        counts = [key for key in expected if key.endswith("activation_counts")]
        different += sum(int((found[key] != expected[key]).sum()) for key in counts)
    return different
