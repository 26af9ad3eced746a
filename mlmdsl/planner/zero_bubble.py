"""Schedules that take a backward pass apart, over stages that lie in a V: stage s and stage 2p - 1 - s on rank s.

    zb_v        ZB-V (Qi et al. 2024, arXiv:2405.15362, "Pipeline Parallelism with Controllable Memory"), torch's
                ScheduleZBVZeroBubble
    dualpipe_v  DualPipeV (DeepSeek 2024, arXiv:2412.19437, section 3.2.1, cut in half), torch's ScheduleDualPipeV

The gradients of a stage's input (I) are what the stage before waits for; those of its weights (W) fill what would be a bubble.
Where nothing waits, both run at once (B). The first stage has no input to give a gradient to: its I is empty, its W the whole
backward pass, as torch runs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, groupby, repeat
from typing import Literal, NamedTuple

Kind = Literal["F", "I", "W", "B"]  # forward; backward to the input, to the weights, both
KINDS: tuple[Kind, ...] = ("F", "I", "W", "B")
_KIND: Mapping[str, Kind] = {kind: kind for kind in KINDS}
_INDEX = {kind: index for index, kind in enumerate(KINDS)}


class Pass(NamedTuple):
    kind: Kind
    stage: int
    micro_batch: int


Unit = tuple[tuple[Kind, int], ...]  # passes in a row, each of the rank's first stage (0) or its second one (1)
Script = tuple[tuple[int, Unit], ...]  # how often units are repeated


@cache
def order(schedule: str, pipeline: int, micro_batches: int, rank: int) -> tuple[Pass, ...]:
    """The passes of a rank, one after another: torch's own order."""
    stages, found = (rank, 2 * pipeline - 1 - rank), list[Pass]()
    forward, inner, outer = [0, 0], [0, 0], [0, 0]  # micro-batches that have been
    for kind, mine in chain.from_iterable(unit * times for times, unit in _made(schedule, pipeline, micro_batches, rank)):
        of = forward if kind == "F" else outer if kind == "W" else inner
        found.append(Pass(kind, stages[mine], of[mine]))
        of[mine] += 1
        outer[mine] += kind == "B"
    return tuple(item for item in found if item.micro_batch < micro_batches)


def script(schedule: str, pipeline: int, micro_batches: int, rank: int) -> Script:
    """The same in short."""
    if schedule == "zb_v" and micro_batches < 2 * pipeline - 1:
        return tuple(
            (1, ((kind, int(stage >= pipeline)),)) for kind, stage, _ in order(schedule, pipeline, micro_batches, rank)
        )
    return _made(schedule, pipeline, micro_batches, rank)


def _made(schedule: str, pipeline: int, micro_batches: int, rank: int) -> Script:
    """zb_v: made for 2 p - 1 micro-batches at least; what is too many is left out."""
    if schedule == "zb_v":
        parts = _zb_v(pipeline, max(2 * pipeline - 1, micro_batches), rank)
    else:
        parts = _dualpipe_v(pipeline, micro_batches, rank)
    return tuple((times, _unit(passes)) for times, passes in parts if times > 0)


@cache
def _unit(passes: str) -> Unit:
    """From the names of kinds and the numbers of stages."""
    return tuple((_KIND[name[0]], int(name[1]) - 1) for name in passes.split())


def _zb_v(p: int, micro_batches: int, rank: int) -> list[tuple[int, str]]:
    return [
        (2 * (p - rank) - 1, "F1"),
        (rank, "F2 F1"),
        (p - rank, "F2 I2 W2"),
        (micro_batches - 2 * p + rank + 1, "F1 I1 W1 F2 I2 W2"),
        (p - rank - 1, "I1 W1 F2 I2 W2"),
        (rank, "I1 I2"),
        (p - rank, "I1 W1"),
        (rank, "W2"),
        (rank, "W1"),
    ]


def _dualpipe_v(p: int, micro_batches: int, rank: int) -> list[tuple[int, str]]:
    """What waits for its gradients of weights at the end is made up for in order."""
    rest, odd, half = p - rank - 1, rank % 2, (rank + 1) // 2
    waiting = ["W1"] * (1 - odd) + ["W2", "W1"] * half + ["W1"] * rest
    return [
        (2 * rest, "F1"),
        (rank + 1, "F1 F2"),
        (rest, "I2 W2 F2"),
        (micro_batches - 2 * p + rank + 1, "F1 B2 F2 B1"),
        (rest, "B2 F2 B1"),
        (half, "B2 B1"),
        (1 - odd, "B2 I1"),
        (half, "I2 I1"),
        *((len(list(each)), f"{weights} I1") for weights, each in groupby(waiting[:rest])),
        *((len(list(each)), weights) for weights, each in groupby(waiting[rest:])),
    ]


@cache
def passes(schedule: str, pipeline: int, micro_batches: int) -> list[tuple[int, int, int]]:
    """All ranks' passes in an order in which none waits for a later one: (cost: index of the kind x stages + stage; the rank's
    pass before; the pass that its input comes from), these two numbered from one, 0 for none."""
    lanes = [_lane(schedule, pipeline, micro_batches, rank) for rank in range(pipeline)]
    numbers: list[int | None] = [None] * (4 * pipeline * micro_batches) + [0, 0]  # of the passes at a place
    done, before, found = [0] * pipeline, [0] * pipeline, list[tuple[int, int, int]]()
    running = True
    while running:
        running = False
        for rank, lane in enumerate(lanes):
            at, previous, end = done[rank], before[rank], len(lane)
            while at < end:
                cost, awaited, place = lane[at]
                number = numbers[awaited]
                if number is None:
                    break
                found.append((cost, previous, number))
                previous = numbers[place] = len(found)
                at += 1
            running = running or at > done[rank]
            done[rank], before[rank] = at, previous
    assert all(at == len(lane) for at, lane in zip(done, lanes, strict=True)), "the schedule waits for itself"
    return found


def _lane(schedule: str, pipeline: int, micro_batches: int, rank: int) -> list[tuple[int, int, int]]:
    """A rank's passes: (cost, the place of the pass that its input comes from, its own place). Places are those of forward
    passes and of gradients of inputs, by stage and micro-batch; one that is always there; and one that none looks for."""
    m, stages = micro_batches, 2 * pipeline
    nothing, nobody = 2 * stages * m, 2 * stages * m + 1
    been, lane = {(kind, mine): 0 for kind in "FI" for mine in (0, 1)}, list[tuple[int, int, int]]()
    for times, unit in script(schedule, pipeline, micro_batches, rank):
        columns: list[Iterator[tuple[int, int, int]]] = []
        for kind, mine in unit:
            stage, of = stages - 1 - rank if mine else rank, "F" if kind == "F" else "I"
            awaited, place = repeat(nothing, times), repeat(nobody, times)
            if kind != "W":
                place, sign = (stage if of == "F" else stages + stage) * m + been[of, mine], -1 if of == "F" else 1
                been[of, mine] += times
                if 0 <= stage + sign < stages:
                    awaited = range(place + sign * m, place + sign * m + times)
                place = range(place, place + times)
            columns.append(zip(repeat(_INDEX[kind] * stages + stage, times), awaited, place, strict=True))
        lane += chain.from_iterable(zip(*columns, strict=True))
    return lane


Seconds = Sequence[float]  # by stage


def seconds(schedule: str, forward: Seconds, backward: Seconds, weight: Seconds, micro_batches: int, pipeline: int) -> float:
    """Of all micro-batches. backward: both parts of it, weight: that of the weights."""
    stages = len(forward)
    inner = [0.0, *(b - w for b, w in zip(backward[1:], weight[1:], strict=True))]
    outer = [backward[0], *weight[1:]]
    costs = [*forward, *inner, *outer, *backward]
    assert len(costs) == len(KINDS) * stages
    ends = [0.0]
    for cost, one, other in passes(schedule, pipeline, micro_batches):
        free, arrived = ends[one], ends[other]
        ends.append((free if free > arrived else arrived) + costs[cost])
    return max(ends)


@cache
def apart(schedule: str, pipeline: int, micro_batches: int) -> float:
    """The share of backward passes that are taken apart: all, or as many as it takes to fill and drain the pipeline."""
    if schedule == "zb_v":
        return 1.0
    few = min(micro_batches, 2 * pipeline)
    scripts = (script(schedule, pipeline, few, rank) for rank in range(pipeline))
    parted = sum(times * (kind == "W") for each in scripts for times, unit in each for kind, _ in unit)
    return parted / (2 * pipeline * micro_batches)


def in_flight(schedule: str, pipeline: int, micro_batches: int, rank: int) -> tuple[int, int]:
    """Micro-batches of each of the rank's two stages, in model order, between forward pass and the gradients of their weights,
    when they are the most in all: those of the warm-up, after which a pass comes for each that goes."""
    first = 2 * pipeline - rank - (schedule == "zb_v")
    return min(micro_batches, first), min(micro_batches, rank + 1)
