"""Distributions of layers that memory limits, where stages lie on unlike devices.

Layers are first laid on stages by their speed alone. Where such a plan does not fit, another distribution of the same plan may:
stages with less memory, or that hold more micro-batches, get fewer.
"""

from __future__ import annotations

from functools import cached_property, partial
from math import inf

from mlmdsl.planner import schedule
from mlmdsl.planner.candidate import Candidate
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.proportion import Speed, proportion
from mlmdsl.planner.rooms import Rooms
from mlmdsl.planner.stages import Part


def slowest(place: Place, c: Candidate) -> float:
    """Seconds that the slowest rank takes for its passes, sends left aside."""
    each = [0.0] * place.pipeline
    for rank, stages in enumerate(c.cut.placed):
        for stage in stages:
            cost = place.benches[rank].part(c.cut.parts[stage], c.micro_batch, c.recompute, place.pipeline > 1)
            each[rank] += cost.forward + cost.backward
    return place.micro_batches(c.micro_batch) * max(each)


class Fitting:
    """The slowest stage as fast as memory allows. Several stages of a rank share its memory evenly: none is larger than if all
    of them were as large."""

    def __init__(self, place: Place, c: Candidate):
        self.place, self.c, self.chain = place, c, place.bench.setting.chain
        self.last = len(c.cut.stages) - 1
        self._lefts: dict[tuple[int, int, int, tuple[int, ...]], int] = {}

    @cached_property
    def speeds(self) -> list[Speed]:
        c = self.c
        return self.place.speeds(c.micro_batch, c.recompute, c.schedule, c.interleave)

    @cached_property
    def _rooms(self) -> Rooms:
        c = self.c
        return Rooms(self.place, c.micro_batch, (c.schedule, c.interleave), (c.recompute,))

    def within(self, c: Candidate, seconds: float = inf) -> Candidate | None:
        """Of a candidate that may differ in ZeRO, what fits in another distribution; None where that takes longer for sure."""
        place = self.place
        if len(self.chain.kinds) == 1:
            limits = self._limits(c, seconds / place.micro_batches(c.micro_batch))
            found = limits and proportion(self.chain, self.speeds, limits)
        else:
            within = seconds / place.micro_batches(c.micro_batch)
            found = proportion(self.chain, self.speeds, room=partial(self._has_room, c), within=within)
        if found is None or found == c.cut.stages:
            return None
        again = c._replace(cut=place.given(found, c.schedule))
        return again if place.over_bytes(again, 0) <= 0 else None

    def _rank(self, stage: int) -> int:
        return schedule.pipeline_rank(self.c.schedule, self.place.pipeline, stage)

    def _left(self, c: Candidate, rank: int, layers: tuple[int, ...]) -> int:
        """Bytes that a rank has left where all of its stages are as large."""
        key = (c.zero, c.replicate, rank, layers)
        found = self._lefts.get(key)
        if found is None:
            parts = tuple(self.chain.part(layers, stage == 0, stage == self.last) for stage in self.c.cut.placed[rank])
            found = self._lefts[key] = self.place.left_bytes(c, rank, parts, self.place.filling(self.c, rank, parts))
        return found

    def _has_room(self, c: Candidate, stage: int, part: Part) -> bool:
        return self._left(c, self._rank(stage), part.layers) >= 0

    def _limits(self, c: Candidate, seconds: float) -> tuple[int, ...] | None:
        """Layers that each virtual stage has room for; None where ranks that take no longer than `seconds` for a micro-batch
        have no room for all."""
        ranks = range(self.place.pipeline)
        timely = [self._timely(rank, seconds) for rank in ranks]
        spare = sum(timely) - self.chain.count
        if spare < 0 or min(timely) < self.c.interleave:
            return None
        most: list[int] = []
        roomy = [room.most for room in self._rooms.of((c.zero, c.replicate))]
        for rank in ranks:
            high = min(self.chain.count - self.last, timely[rank], roomy[rank] // self.c.interleave)
            most.append(self._most(c, rank, high))
            spare -= max(0, timely[rank] - self.c.interleave * most[-1])
            if spare < 0 or not most[-1]:
                return None
        return tuple(most[self._rank(stage)] for stage in range(self.last + 1))

    def _timely(self, rank: int, seconds: float) -> int:
        """Layers of all of a rank's stages together."""
        stages, chain = self.c.cut.placed[rank], self.chain
        speed = self.speeds[stages[0]]
        ends = speed.first * (0 in stages) + speed.last * (self.last in stages)
        return int(min((seconds - ends) / speed.layers[0] * (1 + 1e-9), chain.count)) if seconds > ends else 0

    def _most(self, c: Candidate, rank: int, high: int) -> int:
        """Bytes grow about evenly with layers, about as fast as the bound has it: what is lacking says how many to leave out,
        and what is left at both ends, where it is used up."""
        if high < 1 or (under := self._left(c, rank, (high,))) >= 0:
            return high
        each = self.c.interleave * self._rooms.lines((c.zero, c.replicate))[rank].least
        low = high
        while True:
            low = max(1, min(low - 1, int(low + under / each)))
            if (over := self._left(c, rank, (low,))) >= 0:
                break
            if low == 1:
                return 0
            high, under = low, over
        while high - low > 1:
            middle = min(max(low + over * (high - low) // (over - under), low + 1), high - 1)
            left = self._left(c, rank, (middle,))
            low, over, high, under = (middle, left, high, under) if left >= 0 else (low, over, middle, left)
        return low
