"""The interleaved schedule: its seconds, pass by pass, and what a rank's stages hold.

Passes have slots, one for each micro-batch of a round and each virtual stage of a rank, stage after stage, round after round.
What a rank does in a slot the next one does a tick later, down the ranks in forward passes and up in backward passes:

    the forward pass of slot s on rank r     in tick s + r
    the backward pass of slot s on rank r    in tick s + lag + p - 1 - r, after the forward pass of this tick

So of the passes of a tick none waits for another rank's, and what they wait for was made in the tick before, or when the stage
before ran on the last rank (on the first one, of backward passes).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from math import inf
from typing import NamedTuple

Seconds = Sequence[float]  # by virtual stage
_Ticks = list[tuple[float, ...]]  # what the pass of each rank takes, tick by tick; -inf in an empty slot


class _Grid(NamedTuple):
    """Of some rounds, as forward passes have it, and backward ones a few ticks later: whether all slots of a tick have a pass;
    whether the first rank's on a micro-batch's way waits for none on another rank; ticks from a stage's end on the last rank
    of the way to the next stage on the first."""

    full: list[bool]
    fresh: list[bool]
    turn: int
    lag: int


class _State(NamedTuple):
    """When each rank is free, and done with its latest forward and its latest backward pass; when the last rank was done with
    forward passes, tick by tick, and the first with backward ones."""

    free: list[float]
    down: list[float]
    up: list[float]
    last: list[float]
    first: list[float]


def seconds(forward: Seconds, backward: Seconds, each: int, turns: Sequence[int], pipeline: int) -> list[float]:
    """Of so many rounds with `each` micro-batches, the fewest first."""
    stages = [slice(start, start + pipeline) for start in range(0, len(forward), pipeline)]
    one, interleave = len(stages) * max(each, pipeline), len(stages)
    down = _two_rounds([forward[of] for of in stages], each, range(pipeline))
    up = _two_rounds([backward[of] for of in reversed(stages)], each, range(pipeline - 1, -1, -1))
    state, start, found = _State([0.0] * pipeline, [-inf] * pipeline, [-inf] * pipeline, [], []), 0, list[float]()
    for count in turns:
        grid, downs, ups = _grid(pipeline, interleave, each, count), _rounds(down, one, count), _rounds(up, one, count)
        state, start = _walk(grid, downs, ups, state, start, count * one), count * one
        found.append(max(_walk(grid, downs, ups, state, start, grid.lag + len(ups)).free))
    return found


@cache
def _grid(pipeline: int, interleave: int, each: int, count: int) -> _Grid:
    period = max(each, pipeline)
    slots, after = count * interleave * period, pipeline - 1
    full = [each >= pipeline and after <= tick < slots for tick in range(slots + after)]
    fresh = [tick // period % interleave == 0 or tick >= slots for tick in range(slots + after)]
    return _Grid(full, fresh, period - after, (interleave - 1) * period + after)


def _two_rounds(stages: Sequence[Seconds], each: int, delays: Sequence[int]) -> _Ticks:
    """Of passes that go through these stages, each by rank."""
    after = len(delays) - 1
    idle = [-inf] * (after + 1 - each)
    slots = [[cost for costs in stages for cost in [costs[rank]] * each + idle] for rank in range(len(delays))]
    ranks = [[-inf] * delay + mine * 2 + [-inf] * (after - delay) for delay, mine in zip(delays, slots, strict=True)]
    return list(zip(*ranks, strict=True))


def _rounds(two: _Ticks, one: int, count: int) -> _Ticks:
    """The first, others that begin while the one before comes to its end, and the end of the last."""
    return two[:one] + two[one : 2 * one] * (count - 1) + two[2 * one :]


def _walk(grid: _Grid, downs: _Ticks, ups: _Ticks, state: _State, start: int, stop: int) -> _State:
    """Some ticks on. A pass that is none ends at -inf, so that others do not wait for it."""
    (full, fresh, turn, lag), (free, down, up, last, first) = grid, state
    last, first, end = last.copy(), first.copy(), len(downs)
    for tick in range(start, stop):
        if tick < end:
            arrived = [0.0 if fresh[tick] else last[tick - turn], *down]
            down = [(x if x > y else y) + cost for x, y, cost in zip(free, arrived, downs[tick], strict=False)]
            last.append(down[-1])
            free = down if full[tick] else [*map(max, free, down)]
        if (at := tick - lag) >= 0:
            arrived = [*up[1:], 0.0 if fresh[at] else first[at - turn]]
            up = [(x if x > y else y) + cost for x, y, cost in zip(free, arrived, ups[at], strict=True)]
            first.append(up[0])
            free = up if full[at] else [*map(max, free, up)]
    return _State(free, down, up, last, first)


@cache
def extremes(each: int, interleave: int, ahead: int, end: int) -> tuple[tuple[int, ...], ...]:
    """What each of a rank's stages holds when the first one holds the most, and when the last one does, after `ahead` forward
    passes and before `end`. In a round passes go through the stages, backward passes from the last one on; counts change their
    course where a forward or a backward pass turns to another stage."""
    last, turns = interleave - 1, {turn for start in (0, ahead) for turn in (*range(start, end, each), end)}
    times = sorted({time for turn in turns for time in (turn - 1, turn) if ahead <= time < end})

    def held(stage: int, time: int) -> int:
        return _passed(time + 1, stage, each, interleave) - _passed(time - ahead, last - stage, each, interleave)

    fullest = dict.fromkeys(max(times, key=partial(held, stage)) for stage in (0, last)) if times else ()
    return tuple(dict.fromkeys(tuple(held(stage, time) for stage in range(interleave)) for time in fullest))


def _passed(passes: int, nth: int, each: int, interleave: int) -> int:
    """Of a rank's passes those of its nth stage, in the order in which it comes to them."""
    whole, rest = divmod(passes, each * interleave)
    return whole * each + min(max(rest - nth * each, 0), each)
