"""Memory of one rank while it trains, by kind, in bytes.

What counts is the moment of the highest sum; kinds whose own peaks come at different moments are added up as they are
at that moment (weights gathered by ZeRO-3 with the activations), or at their highest (gradients, optimizer), which
errs on the safe side.
"""

from dataclasses import asdict, dataclass

from r1p_dist.planner.model import ModelShape
from r1p_dist.planner.zero import Zero
from r1p_dist.planner.zero3 import Coordinator

_FP32 = 4


@dataclass(frozen=True)
class Memory:
    """gathered: ZeRO-3's whole copies at the peak, with those of persistent weights that are always there.

    optimizer: fp32 values and both moments. buffers: gradients on their way. pristine: in a file that is mapped into
    memory, given back whenever the system wants it, so not part of the total. method: what it knows of past tasks.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    method: int
    pristine: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values()) - self.pristine


def training_memory(shape: ModelShape, zero: Zero, ranks: int, touches_buffers: bool) -> Memory:
    """Returns the memory of a rank at the peak of a step.

    touches_buffers: only what is written of a buffer counts, as on a CPU; an accelerator reserves all of it.
    """
    size = shape.dtype.itemsize
    parameters = shape.trace.parameters
    trained = shape.count("adapter")
    held = [p for p in parameters if not p.is_trained]
    loss = shape.loss.bytes(ranks)
    activations = max(shape.trace.peak, shape.trace.forward_live + loss)
    gathered = 0
    pristine = shape.pristine_numel * size
    if zero.stage == 3:
        share = sum(-(-p.numel // ranks) for p in parameters if p.is_trained)
        weights = sum(-(-p.numel // ranks) for p in held) + share
        if ranks > 1:  # else its part is the weight
            gathered = highest_with_gathered(shape, zero, ranks, loss) - activations
        pristine = -(-shape.pristine_numel // ranks) * size
    elif zero.stage == 0:
        share, weights = trained, sum(p.numel for p in held) + trained
    else:
        padded = -(-trained // (2 * ranks)) * 2 * ranks
        share, weights = padded // ranks, sum(p.numel for p in held) + padded
    if zero.stage == 0:
        is_half = size < _FP32
        # a half-precision gradient has an fp32 twin from the update on
        gradients = trained * (size + _FP32 if is_half else size)
        optimizer = share * (3 if is_half else 2) * _FP32
        buffers = trained * size
    else:
        gradients = share * _FP32 + (trained * size if zero.stage == 1 else 0)
        optimizer = share * 3 * _FP32
        bucket = min(zero.reduce_bucket_size, trained) if touches_buffers else zero.reduce_bucket_size
        buffers = bucket * size * (2 if zero.overlap_comm and zero.stage < 3 else 1)
    return Memory(weights * size, gathered, gradients, optimizer, activations, buffers, shape.known_bytes, pristine)


def highest_with_gathered(shape: ModelShape, zero: Zero, ranks: int, loss: int) -> int:
    """Returns the highest sum of activations and of weights that ZeRO-3 holds whole, bytes, over a micro step.

    Weights that are gathered together lie there twice until the last of them was used: as the ranks' parts one after
    another, and parameter by parameter. One that is gathered alone lies there once.
    """
    trace, size = shape.trace, shape.dtype.itemsize
    coordinator = Coordinator(trace, zero, ranks)
    before = coordinator.held
    highest, is_forward = 0, True
    for visit, move in zip(trace.visits, coordinator.run(), strict=True):
        sums = [(before, visit.peak), (move.most, visit.live)]
        if visit.is_backward and is_forward:
            sums.append((before, trace.forward_live + loss))
            is_forward = False
        highest = max([highest, *(numel * size + activations for numel, activations in sums)])
        before = move.after
    return max(highest, before * size + trace.tail)


def moment_bytes(shape: ModelShape, ranks: int) -> int:
    """Returns what second moments take on the rank that owns most of them, beside a step's memory, while it scans.

    Beside those, the one of a micro batch that comes and its sum with what was there, of the largest.
    """
    inputs = shape.boundary.inputs
    numels = [[moment.numel for moment in read.moments] for read in inputs]
    owned = max(sum(map(sum, numels[rank::ranks])) for rank in range(ranks))
    return _FP32 * (owned + 2 * max(map(max, numels), default=0))


def checkpoint_bytes(shape: ModelShape) -> dict[str, int]:
    """Returns the bytes of one save in a task (values and both moments, fp32) and of what a finished task leaves."""
    return {"step": 3 * _FP32 * shape.count("adapter"), "task": _FP32 * (shape.merged_numel + shape.left_numel)}
