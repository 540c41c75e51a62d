"""ZeRO-3's fetching and releasing of weights in one micro step, without prefetch.

The rules of DeepSpeed 0.19.8's PartitionedParameterCoordinator with a complete trace: a module's parameters are fetched
together when it is entered and released when it is left, unless they are persistent, in use by another module, or used
again within `stage3_max_reuse_distance` numbers.
"""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from r1p_dist.planner.trace import Trace
from r1p_dist.planner.zero import Zero


class Coordinator:
    """Knows which parameters are whole on a rank (`whole`), from one micro step to the next."""

    def __init__(self, trace: Trace, zero: Zero, ranks: int) -> None:
        self._trace, self._zero = trace, zero
        self._numel = [parameter.numel for parameter in trace.parameters]
        self._padded = [-(-numel // ranks) * ranks for numel in self._numel]
        self._persistent = {i for i, parameter in enumerate(trace.parameters) if zero.is_persistent(parameter)}
        self.whole = set(self._persistent)  # gathered again after every update
        order = [visit.module for visit in trace.visits if visit.is_fetch]
        sizes = (sum(self._numel[i] for i in trace.parameters_of[module]) for module in order)
        self._numel_before = list(accumulate(sizes, initial=0))
        self._uses: dict[int, list[int]] = {}
        for place, module in enumerate(order):
            for i in trace.parameters_of[module]:
                self._uses.setdefault(i, []).append(place)

    def micro_step(self) -> list[int]:
        """Returns the numbers of each gather, padded, in their order."""
        return [numel for numel, _ in self.run() if numel]

    def run(self) -> Iterator[tuple[int, int]]:
        """Yields per visit of the trace the numbers that are gathered (padded) and those that are whole afterwards."""
        users: dict[int, set[int]] = {}
        in_backward: dict[int, None] = {}
        recomputed: dict[int, set[int]] = {}
        place, whole = 0, sum(self._numel[i] for i in self.whole)
        for visit in self._trace.visits:
            module, own = visit.module, self._trace.parameters_of[visit.module]
            gathered = 0
            if visit.is_fetch:
                missing = [i for i in own if i not in self.whole]
                gathered = sum(self._padded[i] for i in missing)
                whole += sum(self._numel[i] for i in missing)
                self.whole.update(missing)
                if visit.is_backward:
                    in_backward[module] = None
                for i in own:
                    users.setdefault(i, set()).add(module)
                    if visit.is_recompute and in_backward and not self._trace.parameters[i].is_trained:
                        owner = next(
                            reversed(in_backward)
                        )  # what a second forward fetched stays until this one is done
                        recomputed.setdefault(owner, set()).add(i)
                        users[i].add(owner)
                place += 1
            else:
                free = {i for i in own if i not in self._persistent and not self._is_needed_soon(i, place)}
                held = set(own)
                if visit.is_backward:
                    again = recomputed.pop(module, set())
                    free |= again - self._persistent
                    held |= again
                    in_backward.pop(module, None)
                whole -= self._release(held, free, users, module)
            yield gathered, whole
        for module in reversed(in_backward):  # what no hook released, as in a block whose input needs no gradient
            held = {*self._trace.parameters_of[module], *recomputed.pop(module, set())}
            self._release(held, held - self._persistent, users, module)

    def _release(self, held: set[int], free: set[int], users: dict[int, set[int]], module: int) -> int:
        released = 0
        for i in held:
            users.get(i, set()).discard(module)
            if i in free and i in self.whole and not users.get(i):
                self.whole.remove(i)
                released += self._numel[i]
        return released

    def _is_needed_soon(self, i: int, place: int) -> bool:
        later = bisect_left(self._uses[i], place)
        if later == len(self._uses[i]):
            return False
        distance = self._numel_before[self._uses[i][later]] - self._numel_before[place]
        return distance < self._zero.max_reuse_distance
