"""Which ranks hold most and come late: where it is known how layers are cut into stages, and where it is known only that they
are alike and balanced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from mlmdsl.planner.schedule import V_SHAPED, Course, Full, extremes, in_flight, links, rounds, stages_of


class Position(NamedTuple):
    """Of a rank: layers of its virtual stages, of those before its first one, and of those behind its last one; links to other
    stages, in one direction or the other; whether it has the model's beginning, and its end."""

    rank: int
    sizes: tuple[int, ...]
    before: int
    behind: int
    links: int
    first: bool
    last: bool


class Load(NamedTuple):
    """Of a rank at one time: how many layers it has; `total`: of micro-batches held times layers; `held`: both by virtual
    stage, the most micro-batches first; `place`: where it lies."""

    layers: int
    total: float
    held: tuple[tuple[float, int], ...]
    place: Position


@cache
def loads_of(course: Course, pipeline: int, micro_batches: int, stages: tuple[int, ...]) -> tuple[Load, ...]:
    """Of ranks and times of which no other has as many layers, holds as much, has as many links and comes as late. `stages`:
    layers of every virtual stage."""
    places = _ends(course[0] in V_SHAPED, pipeline, course[1], stages)
    every = {load for place in places for load in _loads(course, pipeline, micro_batches, place)}
    found: list[Load] = []
    for load in sorted(every, reverse=True):
        if not any(_less(load, other) for other in found):
            found.append(load)
    return tuple(found)


class Interior(NamedTuple):
    """Of a rank that has neither the model's beginning nor its end, at least: layers, micro-batches held times layers, this
    over the most micro-batches of any of them, links to other stages, and layers before its first one."""

    layers: int
    total: float
    even: float
    links: int
    before: int


@cache
def interior_of(full: Full, pipeline: int, layers: int) -> tuple[Interior, ...]:
    """The second rank and the last but one, which hold much and come late, of layers that are alike and balanced: no stage
    between the first and the last has fewer than if these were like it (`stages.balance`). Of each the least under any of the
    schedules."""
    ranks = dict.fromkeys((1, pipeline - 2)) if pipeline > 2 else ()
    each = [[_interior(course, pipeline, m, layers, rank) for course, m in full] for rank in ranks]
    return tuple(Interior(*map(min, zip(*found, strict=True))) for found in each)


@cache
def _interior(course: Course, pipeline: int, micro_batches: int, layers: int, rank: int) -> Interior:
    schedule, interleave = course
    stages = pipeline * interleave
    fewer, rest = divmod(layers, stages)
    mine = stages_of(schedule, pipeline, interleave, rank)
    sizes = tuple(fewer + (stage >= stages - rest) for stage in mine)
    before = 1 + sum(fewer + (stage >= stages - rest) for stage in range(1, rank))  # the first stage has one at least
    place = Position(rank, sizes, before, 0, 2 * interleave, False, False)
    loads = _loads(course, pipeline, micro_batches, place)
    fullest = next(loads) if interleave > 2 else max(loads, key=lambda load: load.total)  # the mean of all stages
    return Interior(sum(sizes), fullest.total, fullest.total / fullest.held[0][0], place.links, before)


def _less(one: Load, other: Load) -> bool:
    here, there = one.place, other.place
    fuller = one.layers <= other.layers and one.total <= other.total and one.held[0] <= other.held[0]
    beyond = here.links <= there.links and here.before <= there.before
    return fuller and beyond and here.first <= there.first and here.last <= there.last


@cache
def _ends(v_shaped: bool, pipeline: int, interleave: int, stages: tuple[int, ...]) -> tuple[Position, ...]:
    """Of the ranks that are alike the first, which holds the most, and the last."""
    schedule, last = V_SHAPED[0] if v_shaped else "interleaved_1f1b", len(stages) - 1
    between, before = links(schedule, pipeline, interleave), [0, *accumulate(stages)]
    alike: dict[tuple[object, ...], list[Position]] = {}
    for rank in range(pipeline):
        mine = stages_of(schedule, pipeline, interleave, rank)
        sizes, handed = tuple([stages[stage] for stage in mine]), sum([sum(between[stage]) for stage in mine])
        around = before[mine[0]], before[-1] - before[mine[-1] + 1]
        place = Position(rank, sizes, *around, handed, 0 in mine, last in mine)
        alike.setdefault((sizes, handed, place.first, place.last), []).append(place)
    return tuple(place for places in alike.values() for place in dict.fromkeys((places[0], places[-1])))


def _loads(course: Course, pipeline: int, micro_batches: int, place: Position) -> Iterator[Load]:
    """At the moments when it may hold the most, as the ledger has them (moments.py)."""
    (schedule, interleave), sizes = course, place.sizes
    counts = in_flight(schedule, pipeline, interleave, micro_batches, place.rank)
    if schedule != "interleaved_1f1b" or rounds(pipeline, micro_batches) == 1:
        yield _load(place, zip(counts, sizes, strict=True))
        return
    if interleave > 2:
        # the larger counts are charged to the larger stages (`memory.Filling.at`): no less than if all were the mean one, in
        # whichever ways layers are recomputed (Chebyshev's sum inequality)
        yield _load(place, [(sum(counts) / interleave, sum(sizes))])
    for most in extremes(pipeline, interleave, micro_batches, place.rank):
        yield _load(place, zip(most, sizes, strict=True))


def _load(place: Position, held: Iterable[tuple[float, int]]) -> Load:
    fullest = tuple(sorted(((count, size) for count, size in held if count), reverse=True))
    total = sum(count * size for count, size in fullest)
    return Load(sum(place.sizes), total, fullest, place)
