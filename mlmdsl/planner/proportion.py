"""Layers of virtual stages on unlike devices: the slowest stage as fast as any contiguous distribution allows, exactly, each
stage timed on its own device and no larger than its memory allows.

Of alike layers (one kind) the next one goes to the stage that then takes the least. Of several kinds, a bound on the slowest
stage is raised until some distribution keeps it: which layers a stage may end before is a set of positions, found stage by
stage from the front, and from the back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from heapq import heapify, heappop, heapreplace
from itertools import accumulate
from math import inf
from typing import NamedTuple

from mlmdsl.planner.stages import Chain, Part

_EPS = 1e-9  # relative: sums of equal numbers in another order
_NEAR = 0.01  # relative: how near a bound is brought to the least one before it is raised step by step

Room = Callable[[int, Part], bool]  # whether a virtual stage can be this part


class Speed(NamedTuple):
    """Seconds of a layer on a stage's device, by kind, and of the model's beginning and end."""

    layers: tuple[float, ...]
    first: float
    last: float


class Paces(NamedTuple):
    """Work of one micro-batch, and how much of it each rank does in a second at the most, whichever parts of the model it runs:
    a rank that is busy for t seconds has done t times its pace."""

    work: float
    ranks: tuple[float, ...]


def paces(chain: Chain, speeds: Sequence[Speed]) -> Paces:
    """Of ranks, in units of the time that all layers take there. Each part of the model counts as what it is worth on the
    device where that is least."""
    layers = {speed: sum(count * speed.layers[kind] for kind, count in chain.layers) for speed in set(speeds)}
    each = ([seconds / whole for seconds in (*speed.layers, speed.first, speed.last)] for speed, whole in layers.items())
    *kinds, first, last = map(min, zip(*each, strict=True))
    work = sum(count * kinds[kind] for kind, count in chain.layers) + first + last
    return Paces(work, tuple(1 / layers[speed] for speed in speeds))


def proportion(
    chain: Chain, speeds: Sequence[Speed], most: Sequence[int] | None = None, room: Room | None = None, within: float = inf
) -> tuple[int, ...] | None:
    """Layers of each virtual stage, one at least; None where there is no room for them. `most`: of alike layers that a stage
    has room for; `room`: of layers of several kinds, of which None may also mean that the slowest stage takes longer than
    `within`. Where a part has room, so has every smaller one."""
    assert 1 <= len(speeds) <= chain.count
    if len(chain.kinds) == 1:
        return _of_one_kind(chain.count, speeds, most or (chain.count,) * len(speeds))
    return _Several(chain, speeds, room).found(within)


def least_seconds(chain: Chain, speeds: Sequence[Speed]) -> float:
    """What the slowest of stages, or of ranks, takes at least, however layers are laid on them: as if they could be divided.
    `speeds`: of each of them."""
    each = [(*speed.layers, speed.first, speed.last) for speed in speeds]
    counts = [0] * len(chain.kinds)
    for kind, count in chain.layers:
        counts[kind] += count
    best = [min(times) for times in zip(*each, strict=True)]
    work = sum(count * seconds for count, seconds in zip((*counts, 1, 1), best, strict=True))
    ratios = [min((time / least for time, least in zip(times, best, strict=True) if least), default=1.0) for times in each]
    return work / sum(1 / ratio for ratio in ratios)


# ---- layers that cost alike -----------------------------------------------------------------------------------------


def _of_one_kind(layers: int, speeds: Sequence[Speed], most: Sequence[int]) -> tuple[int, ...] | None:
    """The next layer goes where the stage then takes the least; of several such stages to the last, which holds the fewest
    micro-batches. As long as layers are left, some stage has fewer than in any given distribution and can take one more for no
    more than the slowest takes there: no distribution has a faster slowest stage, or then a faster second one."""
    last = len(speeds) - 1
    if min(most) < 1 or sum(most) < layers:
        return None
    ends = [speed.first * (stage == 0) + speed.last * (stage == last) for stage, speed in enumerate(speeds)]
    counts = [1] * len(speeds)
    waiting = [(ends[s] + 2 * speed.layers[0], -s) for s, speed in enumerate(speeds) if most[s] > 1]
    heapify(waiting)
    for _ in range(layers - len(speeds)):
        stage = -waiting[0][1]
        counts[stage] += 1
        if counts[stage] < most[stage]:
            heapreplace(waiting, (ends[stage] + (counts[stage] + 1) * speeds[stage].layers[0], -stage))
        else:
            heappop(waiting)
    return tuple(counts)


# ---- layers of several kinds ----------------------------------------------------------------------------------------


class _Several:
    """Positions are layers that lie in front; a set of them is an integer, a bit for each."""

    def __init__(self, chain: Chain, speeds: Sequence[Speed], room: Room | None):
        self.chain, self.speeds, self.room = chain, speeds, room
        self.kinds = [kind for kind, count in chain.layers for _ in range(count)]
        self.count, self.last = chain.count, len(speeds) - 1
        kinds = range(len(chain.kinds))
        self.passed = [tuple(self.kinds[:position].count(kind) for kind in kinds) for position in range(self.count + 1)]
        self.before = {speed: self._before(speed) for speed in dict.fromkeys(speeds)}
        self._ends: dict[tuple[int, int], int] = {}

    def found(self, within: float) -> tuple[int, ...] | None:
        bound = self._least_bound(within)
        return None if bound is None else self._chosen(bound)

    def _before(self, speed: Speed) -> list[float]:
        """What the layers in front of each position cost on this device."""
        costs = [speed.layers[kind] for kind in self.kinds]
        costs[0] += speed.first
        costs[-1] += speed.last
        return [0.0, *accumulate(costs)]

    def _seconds(self, stage: int, start: int, end: int) -> float:
        before = self.before[self.speeds[stage]]
        return before[end] - before[start]

    def roomy(self, stage: int, start: int) -> int:
        """The last position before which a stage that starts here has room to end; `start` for none."""
        most = self.count - (self.last - stage)
        if self.room is None:
            return most
        found = self._ends.get((stage, start))
        if found is None:
            lacks = partial(self._lacks, self.room, stage, start)
            found = self._ends[stage, start] = start + bisect_right(range(start + 1, most + 1), 0, key=lacks)
        return found

    def _lacks(self, room: Room, stage: int, start: int, end: int) -> bool:
        layers = tuple(b - a for a, b in zip(self.passed[start], self.passed[end], strict=True))
        return not room(stage, self.chain.part(layers, stage == 0, stage == self.last))

    def furthest(self, stage: int, start: int, bound: float) -> int:
        """The last position before which a stage that starts here can end; `start` for none."""
        before = self.before[self.speeds[stage]]
        timely = bisect_right(before, before[start] + bound * (1 + _EPS), start) - 1
        return min(timely, self.roomy(stage, start))

    def _starts(self, bound: float) -> tuple[list[int], float]:
        """By stage the positions at which it may start, and then the ends; the next bound that changes them."""
        reached, following = [1], inf
        for stage in range(self.last + 1):
            after, before = 0, self.before[self.speeds[stage]]
            for start in _bits(reached[-1]):
                most = before[start] + bound * (1 + _EPS)
                timely, roomy = bisect_right(before, most, start) - 1, self.roomy(stage, start)
                after |= (1 << (min(timely, roomy) + 1)) - (1 << (start + 1))
                if timely < roomy and before[timely + 1] - before[start] < following:
                    following = before[timely + 1] - before[start]
            reached.append(after)
        return reached, following

    def _tried(self, bound: float) -> tuple[bool, float]:
        """Whether a distribution keeps the bound, and the next bound that may change that. No stage of any distribution ends
        later than where all end as late as they can, which says it, unless one of these can take no layer."""
        start, following, empty = 0, inf, False
        for stage in range(self.last + 1):
            before, end = self.before[self.speeds[stage]], self.furthest(stage, start, bound)
            empty = empty or end == start
            if end < self.roomy(stage, start):
                following = min(following, before[end + 1] - before[start])
            start = end
        if empty and start == self.count:
            reached, following = self._starts(bound)
            return bool(reached[-1] >> self.count & 1), following
        return start == self.count, following

    def _keeps(self, bound: float) -> bool:
        return self._tried(bound)[0]

    def _least_bound(self, within: float) -> float | None:
        """Brought near by halving, then raised to the next value that lets some stage end later."""
        low = least_seconds(self.chain, self.speeds)
        if low > within or not self._keeps(within):
            return None
        high = low
        while high < within and not self._keeps(high):
            low, high = high, min(2 * high, within)
        while high > low * (1 + _NEAR):
            middle = (low + high) / 2
            low, high = (low, middle) if self._keeps(middle) else (middle, high)
        while True:
            kept, following = self._tried(low)
            if kept:
                return low
            low = following

    def _chosen(self, bound: float) -> tuple[int, ...]:
        """From the front, each stage as near to its share of what is left as it may be."""
        starts, _ = self._starts(bound)
        fitting = 1 << self.count  # where a stage has to end for the ones behind it to hold the rest
        ends = [fitting]
        for stage in range(self.last, 0, -1):
            fitting = sum(1 << start for start in _bits(starts[stage]) if self._onwards(stage, start, bound) & fitting)
            ends.append(fitting)
        ends.reverse()
        found: list[int] = []
        start = 0
        for stage, allowed in enumerate(ends):
            choices = list(_bits(self._onwards(stage, start, bound) & allowed))
            share = self._share(stage, start)
            timely = [end for end in choices if self._seconds(stage, start, end) <= share * (1 + _EPS)]
            end = timely[-1] if timely else choices[0]
            found.append(end - start)
            start = end
        return tuple(found)

    def _onwards(self, stage: int, start: int, bound: float) -> int:
        return (1 << (self.furthest(stage, start, bound) + 1)) - (1 << (start + 1))

    def _share(self, stage: int, start: int) -> float:
        """Of this stage and those behind it, if all took as long: by the time each would take for all that is left."""
        return 1 / sum(1 / self._seconds(other, start, self.count) for other in range(stage, self.last + 1))


def _bits(positions: int) -> Sequence[int]:
    return [i for i in range(positions.bit_length()) if positions >> i & 1]
