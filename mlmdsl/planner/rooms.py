"""Layers that the ranks of a pipeline have room for, where they lie on unlike devices: a bound, told before any stage is made.

A rank's bytes grow with its layers, however these are divided among its stages: with the state of each, and with what a layer
keeps for as many micro-batches as the schedule holds there. So its memory says how many layers it has at the most, and how many
before it has to recompute some in a dearer way. These have to add up to the model's, and the ranks that take what others have
no room for take their time (uneven.py).
"""

from __future__ import annotations

from functools import cached_property
from math import inf
from typing import NamedTuple

from mlmdsl.planner.candidate import Candidate
from mlmdsl.planner.demand import held_of, layer_bytes, state_bytes
from mlmdsl.planner.plan import Schedule
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.schedule import V_SHAPED, Course, in_flight, least_counts, pipeline_bound, sums_while_full
from mlmdsl.planner.uneven import Room, least_passes, least_with_room

Choice = tuple[int, int]  # ZeRO, and its copies


class Need(NamedTuple):
    """Bytes of a rank: so many, and for each layer under the mildest way of recomputing, and as few as any of them keeps."""

    fixed: float
    layer: float
    least: float


class Rooms:
    """Of plans with layers of one kind that differ in ZeRO alone, and in how layers are recomputed: each in one of `modes`, the
    mildest first."""

    def __init__(self, place: Place, micro_batch: int, course: Course, modes: tuple[int, ...]):
        self.place, self.course, self.m = place, course, place.micro_batches(micro_batch)
        self.chain = place.bench.setting.chain
        self.held = held_of(place, micro_batch, modes, course[0] in V_SHAPED)
        trades = [bench.trade(micro_batch, modes) for bench in place.benches]
        self.kept, self.least = trades[0].kept / self.chain.count, trades[0].least / self.chain.count
        self.prices = [trade.edges[0][0] if trade.edges else 0.0 for trade in trades]
        self.crossing = place.bench.sums(micro_batch, 0).crossing
        self._lines: dict[Choice, tuple[Need, ...]] = {}
        self._found: dict[Choice, tuple[Room, ...]] = {}

    def of(self, share: Choice) -> tuple[Room, ...]:
        """By rank, at the most."""
        if share not in self._found:
            each = zip(self._free(share), self.lines(share), self.prices, self._counts, strict=True)
            self._found[share] = tuple(
                Room(max(0, int(free / line.least)), free / line.layer, price * line.layer / (self.place.slack * count))
                for free, line, price, count in each
            )
        return self._found[share]

    def over(self, share: Choice) -> int:
        """Bytes that some rank lacks at least, however layers are laid; none where there is room for all."""
        most, stages = [room.most for room in self.of(share)], self.course[1]
        if sum(most) >= self.chain.count and min(most) >= stages:
            return 0
        free, lines = self._free(share), self.lines(share)
        lacking = max(stages * line.least - room for room, line in zip(free, lines, strict=True))
        layers = sum(room / line.least for room, line in zip(free, lines, strict=True))
        evenly = (self.chain.count - layers) / sum(1 / line.least for line in lines)
        return max(1, int(max(lacking, evenly)))

    def _free(self, share: Choice) -> list[float]:
        """Bytes that a rank may use for its layers."""
        return [
            bench.site.capacity_bytes - line.fixed for bench, line in zip(self.place.benches, self.lines(share), strict=True)
        ]

    def lines(self, share: Choice) -> tuple[Need, ...]:
        """By rank, at least."""
        if share not in self._lines:
            layer, *fixed = self._state(share)
            passes = zip(fixed, self._besides, self._counts, strict=True)
            slack, more = self.place.slack, self.place.more_context_bytes(share[1])
            self._lines[share] = tuple(
                Need(state + besides + more, layer + slack * count * self.kept, layer + slack * count * self.least)
                for state, besides, count in passes
            )
        return self._lines[share]

    @cached_property
    def _besides(self) -> list[float]:
        """Bytes other than state and what layers keep, when a backward pass begins. The last stage hands nothing on, nor do the
        two stages where a V turns to each other: what it is given lies in its receive buffer."""
        v_shaped, last, found = self.course[0] in V_SHAPED, self.place.pipeline - 1, list[float]()
        for rank, count in enumerate(self._counts):
            ends = rank == (0 if v_shaped else last)
            buffers = 2 * self.course[1] - (rank == 0) - ends
            inside = max(self.held.working[0], self.held.loss * ends * (not v_shaped)) + buffers * self.held.buffers
            if ends or (v_shaped and rank == last):
                inside -= count * self.crossing
            if v_shaped and rank:  # its two stages differ by a layer
                one, other = in_flight(*self._mesh, rank)
                inside -= self.kept * abs(one - other) / 2
            found.append(self.place.slack * inside + self.place.context_bytes - 1)  # bytes of activations are whole numbers
        return found

    @property
    def _mesh(self) -> tuple[Schedule, int, int, int]:
        schedule, interleave = self.course
        return schedule, self.place.pipeline, interleave, self.m

    @cached_property
    def _counts(self) -> list[float]:
        """Micro-batches that a rank holds of each layer, however its stages share its layers; in a V they do so evenly, but for
        the first and last of all."""
        counts = list(least_counts(*self._mesh))
        if self.course[0] in V_SHAPED:
            counts[1:] = (sum(in_flight(*self._mesh, rank)) / 2 for rank in range(1, self.place.pipeline))
        return counts

    def _state(self, share: Choice) -> list[float]:
        """Bytes of a layer's state, and by rank of what stands around layers."""
        place, chain, sharing = self.place, self.chain, self.place.sharing(*share, 1)
        summed = sums_while_full(self.course[0], place.pipeline, self.m)

        def state(first: bool = False, last: bool = False) -> float:
            return state_bytes(place, chain.part((1,), first, last), sharing, summed)

        layer = layer_bytes(place, sharing, summed)
        fixed = [state() - layer] * place.pipeline
        fixed[0] += state(first=True) - state()
        fixed[0 if self.course[0] in V_SHAPED else -1] += state(last=True) - state()
        return [layer, *fixed]


class Unlike:
    """Bounds of plans on unlike pools whose layers are laid by the ranks' speed, or as memory allows (refitting.py)."""

    def __init__(self) -> None:
        self._passes: dict[tuple[Place, int, Course, int], float] = {}
        self._rooms: dict[tuple[Place, int, Course, tuple[int, ...]], Rooms] = {}

    def least(
        self, place: Place, micro_batch: int, course: Course, modes: tuple[int, ...], share: Choice | None
    ) -> tuple[float, int]:
        """(seconds of all micro-batches through the pipeline, bytes that some rank lacks) at least, where layers are recomputed
        in these ways; `share`: where it is known."""
        key = (place, micro_batch, course, modes[0])
        if key not in self._passes:
            self._passes[key] = least_passes(*key)
        if share is None or len(place.bench.setting.chain.kinds) > 1:
            return self._passes[key], 0
        rooms = self.rooms(place, micro_batch, course, modes)
        if (over := rooms.over(share)) > 0:
            return inf, over
        return max(self._passes[key], least_with_room(*key, rooms.of(share))), 0

    def laid(self, place: Place, c: Candidate, mild: int) -> float:
        """Seconds of all micro-batches at least, of a candidate some of whose layers are recomputed in a milder way: by way of
        any rank, which recomputes as much as it takes for its layers to fit."""
        milder = c._replace(recompute=mild)
        passes = place.passes_seconds(milder, pipeline_bound)
        if mild == c.recompute or len(place.bench.setting.chain.kinds) > 1:
            return passes
        rooms = self.rooms(place, c.micro_batch, (c.schedule, c.interleave), (mild, c.recompute)).of((c.zero, c.replicate))
        costs = [f + b for count, f, b, _ in place.runs(milder) for _ in range(count)]
        before, m = 0.0, place.micro_batches(c.micro_batch)
        for rank, (room, stages) in enumerate(zip(rooms, c.cut.placed, strict=True)):
            more = sum(c.cut.stages[stage] for stage in stages) - room.free
            busy = sum(costs[stage] for stage in stages) + max(0.0, more) * room.dearer
            passes = max(passes, before + m * busy)
            before += costs[rank]
        return passes

    def rooms(self, place: Place, micro_batch: int, course: Course, modes: tuple[int, ...]) -> Rooms:
        key = (place, micro_batch, course, modes)
        if key not in self._rooms:
            self._rooms[key] = Rooms(*key)
        return self._rooms[key]
