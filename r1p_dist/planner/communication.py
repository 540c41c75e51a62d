"""The collectives of a step, of a task boundary and of a batch scanned there: which, how often, with how many bytes.

Bytes are those of the whole tensor, the larger of input and output, padding included, as `CollectiveCounter` counts
them. The rules are those of DeepSpeed 0.19.8 (runtime/engine.py, runtime/zero/stage_1_and_2.py, stage3.py and
partitioned_param_coordinator.py) and of this package. A step is one in the middle of a task: the first two steps under
ZeRO-3 also compare their order of modules among ranks.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from r1p_dist.errors import InputError
from r1p_dist.interrupts import STOP_SIGNALS
from r1p_dist.planner.model import ModelShape
from r1p_dist.planner.network import Collective, Collectives
from r1p_dist.planner.zero import Zero
from r1p_dist.planner.zero3 import Coordinator

_ENGINE_BUCKET = 500_000_000  # numbers in one all-reduce at stage 0, fixed in DeepSpeed's engine
_VOTE_BYTES = 8  # int64
_BARRIER_BYTES = 1
_LENGTH_BYTES = 8  # int64
_SHAPE_BYTES = 8 * 8  # int64, of `shaped_from_rank`
_FP32 = 4


def step_collectives(shape: ModelShape, zero: Zero, ranks: int, micro_steps: int) -> Collectives:
    """Returns what one rank takes part in during one optimizer step.

    InputError: a bucket smaller than a trained tensor, which ZeRO would split.
    """
    found: Collectives = Counter()
    if ranks > 1:
        for _ in range(micro_steps):
            if shape.vote == "global":
                found.update(_votes(shape))
            found.update(_gates(shape))
            found.update(shape.loss.micro_step(zero.stage, ranks))
        found.update(shape.loss.step())
        found[Collective("all_reduce", 4 * (len(STOP_SIGNALS) + 1), "signals and faults")] += 1
        if shape.vote in ("lagged", "local"):
            votes = sum(adapted.rank for adapted in shape.adapted) * _VOTE_BYTES
            found[Collective("all_reduce", votes, "votes")] += 1
    found.update(_reductions(shape, zero, ranks, micro_steps))
    found.update(_after_update(shape, zero, ranks))
    found.update(_weights(shape, zero, ranks, micro_steps))
    return found


def scan_collectives(shape: ModelShape, zero: Zero, ranks: int, micro_steps: int) -> Collectives:
    """Returns what one rank takes part in for each global batch that the method scans after a task.

    Under ZeRO-3 a scan gives back all weights after each micro batch, persistent ones too; the first micro batch, which
    still finds those, counts like the others. Of a scan without a backward the weights of a whole micro step count.
    """
    found: Collectives = Counter()
    plan = shape.boundary
    if plan.needs is None or ranks == 1:
        return found
    for _ in range(micro_steps):
        found.update(shape.loss.scan(plan.needs, zero.stage, ranks))
        for read in plan.inputs:
            found.update(Collective("reduce", _FP32 * moment.numel, "moments") for moment in read.moments)
    found.update(shape.loss.step())
    found.update(_weights(shape, zero, ranks, micro_steps, keeps_persistent=False))
    return found


def _weights(shape: ModelShape, zero: Zero, ranks: int, micro_steps: int, keeps_persistent: bool = True) -> Collectives:
    """What ZeRO-3 gathers. keeps_persistent: from one micro step to the next."""
    found: Collectives = Counter()
    if zero.stage == 3 and ranks > 1:
        coordinator = Coordinator(shape.trace, zero, ranks)
        for _ in range(micro_steps):
            if not keeps_persistent:
                coordinator.whole.clear()
            for numel in coordinator.micro_step():
                found[Collective("all_gather", numel * shape.dtype.itemsize, "weights")] += 1
    return found


def _votes(shape: ModelShape) -> list[Collective]:
    """One sum per group of layers that vote together."""
    sizes: Counter[int] = Counter()
    for adapted in shape.adapted:
        sizes[adapted.group] += adapted.rank
    return [Collective("all_reduce", size * _VOTE_BYTES, "votes") for size in sizes.values()]


def _gates(shape: ModelShape) -> list[Collective]:
    """The mean probabilities of a trained router, forward and backward, and again in a second forward."""
    if shape.vote == "local":
        return []
    return [
        Collective("all_reduce", a.gate_bytes, "gates")
        for a in shape.adapted
        if a.gate_bytes
        for _ in range(3 if a.is_recomputed else 2)
    ]


def _reductions(shape: ModelShape, zero: Zero, ranks: int, micro_steps: int) -> Collectives:
    """The sums of gradients, bucket by bucket."""
    parameters, found = shape.trace.parameters, Counter()
    named = [i for i, parameter in enumerate(parameters) if parameter.is_trained]
    arriving = shape.trace.gradients
    largest = max(parameters[i].numel for i in named)
    if zero.stage and largest > zero.reduce_bucket_size:
        raise InputError(
            f"zero_optimization.reduce_bucket_size={zero.reduce_bucket_size}: one trained tensor has {largest} numbers "
            "and the planner does not split it; use a bucket that holds it"
        )
    if zero.stage == 0:
        buckets, times = _filled(named, shape, _ENGINE_BUCKET), 1
    elif zero.stage == 1:
        # without overlap they are collected after the last backward, by name
        buckets, times = _packed(arriving if zero.overlap_comm else named, shape, zero.reduce_bucket_size), 1
    else:
        buckets, times = _packed(arriving, shape, zero.reduce_bucket_size), micro_steps
    for bucket in buckets:
        if zero.stage == 3:
            numel = sum(_padded(parameters[i].numel, ranks) for i in bucket)
            collective = Collective("reduce_scatter", numel * shape.dtype.itemsize, "gradients")
        else:
            numel = sum(parameters[i].numel for i in bucket)
            collective = Collective("all_reduce", numel * shape.dtype.itemsize, "gradients")
        found[collective] += times
    return found


def _packed(order: Iterable[int], shape: ModelShape, size: int) -> list[list[int]]:
    """Splits the gradients as ZeRO does: a bucket is sent before one that would not fit."""
    buckets: list[list[int]] = [[]]
    elements = 0
    for i in order:
        numel = shape.trace.parameters[i].numel
        if buckets[-1] and elements + numel > size:
            buckets.append([])
            elements = 0
        buckets[-1].append(i)
        elements += numel
    return [bucket for bucket in buckets if bucket]


def _filled(order: Iterable[int], shape: ModelShape, size: int) -> list[list[int]]:
    """Splits the gradients as DeepSpeed's engine does: a bucket is sent once it is over its size."""
    buckets: list[list[int]] = [[]]
    elements = 0
    for i in order:
        buckets[-1].append(i)
        elements += shape.trace.parameters[i].numel
        if elements > size:
            buckets.append([])
            elements = 0
    return [bucket for bucket in buckets if bucket]


def _after_update(shape: ModelShape, zero: Zero, ranks: int) -> Collectives:
    """Gradient norms, and new values that go to all ranks."""
    found: Collectives = Counter()
    trained = sum(parameter.numel for parameter in shape.trace.parameters if parameter.is_trained)
    if zero.stage == 0 and zero.has_clipping and shape.dtype == torch.float32:  # bf16's optimizer has whole gradients
        found[Collective("all_reduce", 4, "gradient norm")] += 1
    if zero.stage in (1, 2):
        if zero.takes_norm:
            found[Collective("all_reduce", 4, "gradient norm")] += 1
        if zero.checks_overflow:
            found[Collective("all_reduce", 1, "overflow")] += 1
        if ranks > 1:
            padded = _padded(trained, 2 * ranks)
            found[Collective("all_gather", padded * shape.dtype.itemsize, "new values")] += 1
    if zero.stage == 3:
        found[Collective("all_reduce", 8, "gradient norm")] += 1
        if ranks > 1:
            for parameter in shape.trace.parameters:
                if zero.is_persistent(parameter):
                    numel = _padded(parameter.numel, ranks)
                    found[Collective("all_gather", numel * shape.dtype.itemsize, "persistent weights")] += 1
    return found


def boundary_collectives(shape: ModelShape, zero: Zero, ranks: int) -> Collectives:
    """Returns what one rank takes part in from the last step of a task to the first of the next, evaluations and the
    batches of a scan left out.

    The experts are read before and for the merge, begun anew, and given to a new engine. What the task leaves is
    written, and the method looks at what it knows of past tasks.
    """
    found = _writes(shape, ranks)
    found.update(_past(shape, zero, ranks))
    size = shape.dtype.itemsize
    if zero.stage < 3:  # a new engine sends all parameters from rank 0
        found.update(Collective("broadcast", p.numel * size, "engine") for p in shape.trace.parameters)
        return found
    for parameter in shape.trace.parameters:
        if parameter.kind == "frozen":
            continue
        is_router, is_persistent = ".router." in parameter.name, zero.is_persistent(parameter)
        found[Collective("broadcast", parameter.numel * size, "fresh experts")] += 1
        found[Collective("all_gather", _padded(parameter.numel, ranks) * size, "engine")] += parameter.is_trained
        if ranks > 1:
            numel = _padded(parameter.numel, ranks)
            # read before the merge (where no whole copy is kept), for it, and to be begun anew
            reads = (0 if is_persistent else 1) if is_router else (2 if is_persistent else 3)
            found[Collective("all_gather", numel * size, "experts")] += reads
    found[Collective("barrier", _BARRIER_BYTES, "engine")] += 3
    return +found


def _writes(shape: ModelShape, ranks: int) -> Collectives:
    """Rank 0 writes two files: what was merged, and what the method keeps for later tasks.

    Ranks tell each other what they keep, and rank 0 how each write ended: JSON, and before it its length. Rank 0 gets
    what the others keep, with its shape, by way of all.
    """
    if ranks == 1:
        return Counter()
    left = [read.left for read in shape.boundary.inputs]
    names = [[name for read in left[rank::ranks] for name in read] for rank in range(min(ranks, len(left)))]
    kept, answer = max(len(json.dumps(own)) for own in [[], *names]), len(json.dumps({"result": None}))
    found = Counter(Collective("all_gather", ranks * size, "files") for size in (_LENGTH_BYTES, kept))
    found.update(2 * [Collective("broadcast", size, "files") for size in (_LENGTH_BYTES, answer)])
    for number, read in enumerate(left):
        if number % ranks:
            found.update(_shaped(read.values(), "files"))
    return found


def _past(shape: ModelShape, zero: Zero, ranks: int) -> Collectives:
    """What is known of past tasks goes from its owners to all."""
    found: Collectives = Counter()
    if ranks == 1:
        return found
    plan = shape.boundary
    found.update(Collective("all_reduce", size, "past tasks") for size in plan.sums)
    for read in plan.inputs:
        found.update(_shaped(read.sent, "past tasks"))
    if plan.reads_weights and zero.stage == 3:
        # persistent ones too, for the engine is new
        for i in {adapted.weight for adapted in shape.adapted}:
            size = _padded(shape.trace.parameters[i].numel, ranks) * shape.dtype.itemsize
            found[Collective("all_gather", size, "past tasks")] += 1
    return found


def _shaped(numels: Iterable[int], purpose: str) -> Iterator[Collective]:
    """Tensors in fp32 that go from one rank to all, each after its shape."""
    for numel in numels:
        yield Collective("broadcast", _SHAPE_BYTES, purpose)
        yield Collective("broadcast", _FP32 * numel, purpose)


def _padded(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple
