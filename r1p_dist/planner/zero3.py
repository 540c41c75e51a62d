"""ZeRO-3's fetching, prefetching and releasing of weights in one micro step.

The rules of DeepSpeed 0.19.8's PartitionedParameterCoordinator with a complete trace. A module's parameters are fetched
together when it is entered, and then more of those that come next: `stage3_prefetch_bucket_size` numbers each time, up
to `stage3_max_live_parameters` altogether. They are released when a module is left, unless they are persistent, in use
by another module, used again within `stage3_max_reuse_distance` numbers, or still there when prefetching came by their
next use.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from r1p_dist.planner.trace import Trace
from r1p_dist.planner.zero import Zero


@dataclass
class _Gather:
    """Several parameters that were gathered together. size: the numbers of their flat buffer, padded.

    The buffer stays until all of them were waited for by their own module; with the first, all get their own copy.
    """

    waiting: set[int]
    size: int
    is_copied: bool = False


@dataclass(frozen=True)
class Move:
    """What one visit of a module moves. gathers: numbers of each all-gather, padded.

    most, after: the numbers that are whole, in buffers of gathers or in copies: at most during the visit, and after it.
    """

    gathers: list[int]
    most: int
    after: int


class Coordinator:
    """Knows which parameters are whole on a rank, from one micro step to the next.

    whole: per parameter the numbers of its storage. What was gathered alone keeps the buffer, padded, and has no copy.
    """

    def __init__(self, trace: Trace, zero: Zero, ranks: int) -> None:
        self._trace, self._zero = trace, zero
        self._numel = [parameter.numel for parameter in trace.parameters]
        self._padded = [-(-numel // ranks) * ranks for numel in self._numel]
        self._persistent = {i for i, parameter in enumerate(trace.parameters) if zero.is_persistent(parameter)}
        self.whole = {i: self._padded[i] for i in self._persistent}  # gathered again, each alone, after every update
        order = [visit.module for visit in trace.visits if visit.is_fetch]
        # what was there before the adapters comes first in a module
        own = [sorted(parameters, key=self._is_new) for parameters in trace.parameters_of]
        self._coming = [(i, place) for place, module in enumerate(order) for i in own[module]]
        sizes = (sum(self._numel[i] for i in trace.parameters_of[module]) for module in order)
        self._numel_before = list(accumulate(sizes, initial=0))
        self._uses: dict[int, list[int]] = {}
        for place, module in enumerate(order):
            for i in trace.parameters_of[module]:
                self._uses.setdefault(i, []).append(place)

    def _is_new(self, i: int) -> tuple[bool, int]:
        return self._trace.parameters[i].kind != "frozen", i

    @property
    def held(self) -> int:
        """The numbers of whole parameters between two micro steps."""
        return sum(self.whole.values())

    def micro_step(self) -> list[int]:
        """Returns the numbers of each gather, padded, in their order."""
        return [numel for move in self.run() for numel in move.gathers]

    def run(self) -> Iterator[Move]:
        """Yields per visit of the trace what it moves."""
        users: dict[int, set[int]] = {}
        in_backward: dict[int, None] = {}
        recomputed: dict[int, set[int]] = {}
        queue, met = deque(self._coming), {}  # met: per parameter the last use that a fetch or prefetch looked at
        flying: dict[int, _Gather] = {}
        place, held, live = 0, self.held, 0
        for visit in self._trace.visits:
            module, own = visit.module, self._trace.parameters_of[visit.module]
            if visit.is_fetch:
                gathers = []
                if missing := [i for i in own if i not in self.whole]:
                    gathers.append(self._gather(missing, flying))
                held += sum(gathers)
                live += sum(self._numel[i] for i in missing)
                if visit.is_backward:
                    in_backward[module] = None
                copied, freed = _wait(own, flying, self._numel)
                most = held + copied
                held = most - freed
                for i in own:
                    users.setdefault(i, set()).add(module)
                    if visit.is_recompute and in_backward and not self._trace.parameters[i].is_trained:
                        owner = next(
                            reversed(in_backward)
                        )  # what a second forward fetched stays until this one is done
                        recomputed.setdefault(owner, set()).add(i)
                        users[i].add(owner)
                for _ in range(sum(met.get(i, -1) < place for i in own)):
                    i, use = queue.popleft()
                    met[i] = use
                if ahead := self._ahead(queue, met, live):
                    gathers.append(self._gather(ahead, flying))
                    held += gathers[-1]
                    live += sum(self._numel[i] for i in ahead)
                place += 1
                yield Move(gathers, max(most, held), held)
            else:
                free = {
                    i
                    for i in own
                    if i not in self._persistent and met.get(i, -1) <= place and not self._is_needed_soon(i, place)
                }
                uses = set(own)
                if visit.is_backward:
                    again = recomputed.pop(module, set())
                    free |= again - self._persistent
                    uses |= again
                    in_backward.pop(module, None)
                for i in self._release(uses, free, users, module):
                    live -= self._numel[i]
                    held -= self.whole.pop(i)
                yield Move([], held, held)
        for module in reversed(in_backward):  # what no hook released, as in a block whose input needs no gradient
            uses = {*self._trace.parameters_of[module], *recomputed.pop(module, set())}
            for i in self._release(uses, uses - self._persistent, users, module):
                del self.whole[i]

    def _gather(self, parameters: list[int], flying: dict[int, _Gather]) -> int:
        size = sum(self._padded[i] for i in parameters)
        if len(parameters) == 1:
            self.whole[parameters[0]] = size
        else:
            flying.update(dict.fromkeys(parameters, _Gather(set(parameters), size)))
            self.whole.update((i, self._numel[i]) for i in parameters)
        return size

    def _ahead(self, queue: deque[tuple[int, int]], met: dict[int, int], live: int) -> list[int]:
        """Returns what is to be gathered ahead of its use, and takes it off the queue."""
        most = min(self._zero.max_live - live, self._zero.prefetch_bucket_size)
        found: dict[int, None] = {}
        numel = 0
        while self._zero.prefetch_bucket_size and queue and numel < most:
            i, use = queue.popleft()
            met[i] = max(met.get(i, -1), use)
            if i not in self.whole and i not in found:
                found[i] = None
                numel += self._numel[i]
        return list(found)

    def _release(self, held: set[int], free: set[int], users: dict[int, set[int]], module: int) -> list[int]:
        """Ends a module's use of what it held; returns what is to go."""
        for i in held:
            users.get(i, set()).discard(module)
        return [i for i in held if i in free and i in self.whole and not users.get(i)]

    def _is_needed_soon(self, i: int, place: int) -> bool:
        later = bisect_left(self._uses[i], place)
        if later == len(self._uses[i]):
            return False
        distance = self._numel_before[self._uses[i][later]] - self._numel_before[place]
        return distance < self._zero.max_reuse_distance


def _wait(own: list[int], flying: dict[int, _Gather], numel: list[int]) -> tuple[int, int]:
    """Lets a module wait for its parameters; returns the numbers that are copied, and those of buffers that go."""
    copied = freed = 0
    for i in own:
        gather = flying.pop(i, None)
        if gather is None:
            continue
        if not gather.is_copied:
            copied += sum(numel[other] for other in gather.waiting)
            gather.is_copied = True
        gather.waiting.remove(i)
        if not gather.waiting:
            freed += gather.size
    return copied, freed
