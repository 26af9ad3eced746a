"""Schedules that take a backward pass apart, over stages that lie in a V: stage s and stage 2p - 1 - s on rank s.

    zb_v        ZB-V (Qi et al. 2024, arXiv:2405.15362, "Pipeline Parallelism with Controllable Memory"), torch's
                ScheduleZBVZeroBubble
    dualpipe_v  DualPipeV (DeepSeek 2024, arXiv:2412.19437, section 3.2.1, cut in half), torch's ScheduleDualPipeV

The gradients of a stage's input (I) are what the stage before waits for; those of its weights (W) fill what would be a bubble.
Where nothing waits, both run at once (B). The first stage has no input to give a gradient to: its I is empty, its W the whole
backward pass, as torch runs it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import Literal, NamedTuple

Kind = Literal["F", "I", "W", "B"]  # forward; backward to the input, to the weights, both
KINDS: tuple[Kind, ...] = ("F", "I", "W", "B")
_TOGETHER: Mapping[str, tuple[Kind, ...]] = {
    "FIW": ("F", "I", "W"),
    "IW": ("I", "W"),
    "F": ("F",),
    "I": ("I",),
    "W": ("W",),
    "B": ("B",),
}
_INDEX = {kind: index for index, kind in enumerate(KINDS)}


class Pass(NamedTuple):
    kind: Kind
    stage: int
    micro_batch: int


class _Order:
    """A rank's passes in the making: each kind of a stage counts its micro-batches."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self.count: defaultdict[tuple[str, int], int] = defaultdict(int)
        self.waiting: list[tuple[int, int]] = []  # (stage, micro-batch) of input gradients whose weights' are to come

    def add(self, kinds: str, stage: int) -> None:
        count = self.count
        for kind in _TOGETHER[kinds]:
            key = ("I" if kind == "B" else kind), stage
            self.passes.append(Pass(kind, stage, count[key]))
            count[key] += 1
            if kind == "B":
                count["W", stage] += 1

    def backward(self, stage: int, split: bool) -> None:
        """All of it; split: the input's gradients now, the weights' when there is time."""
        if split:
            self.waiting.append((stage, self.count["I", stage]))
        self.add("I" if split else "B", stage)

    def catch_up(self) -> None:
        if self.waiting:
            self.passes.append(Pass("W", *self.waiting.pop(0)))


@cache
def order(schedule: str, pipeline: int, micro_batches: int, rank: int) -> tuple[Pass, ...]:
    """The passes of a rank, one after another: torch's own order."""
    make = _zb_v if schedule == "zb_v" else _dualpipe_v
    return tuple(make(pipeline, micro_batches, rank))


def _zb_v(p: int, micro_batches: int, rank: int) -> Sequence[Pass]:
    """Made for 2 p - 1 micro-batches at least; what is too many is left out."""
    first, second, most = rank, 2 * p - 1 - rank, max(2 * p - 1, micro_batches)
    o = _Order()
    for _ in range(2 * (p - rank) - 1):
        o.add("F", first)
    for _ in range(rank):
        o.add("F", second)
        o.add("F", first)
    for _ in range(p - rank):
        o.add("FIW", second)
    while o.count["F", second] < o.count["F", first] or o.count["F", first] < most:
        o.add("FIW" if o.count["F", first] < most else "IW", first)
        o.add("FIW", second)
    for _ in range(rank):
        o.add("I", first)
        o.add("I", second)
    for _ in range(p - rank):
        o.add("IW", first)
    for stage in (second, first):
        while o.count["W", stage] < o.count["I", stage]:
            o.add("W", stage)
    return [item for item in o.passes if item.micro_batch < micro_batches]


def _dualpipe_v(p: int, micro_batches: int, rank: int) -> Sequence[Pass]:
    first, second = rank, 2 * p - 1 - rank
    o = _Order()
    for _ in range(2 * (p - rank - 1)):
        o.add("F", first)
    for _ in range(rank + 1):
        o.add("F", first)
        o.add("F", second)
    for _ in range(p - rank - 1):
        o.backward(second, split=True)
        o.catch_up()
        o.add("F", second)
    for _ in range(micro_batches - 2 * p + rank + 1):
        o.add("F", first)
        o.add("B", second)
        o.add("F", second)
        o.add("B", first)
    for _ in range(p - rank - 1):
        o.add("B", second)
        o.add("F", second)
        o.add("B", first)
    split = False
    for turn, stage in product(range(rank + 1), (second, first)):
        split = split or (turn == (rank + 1) // 2 and (stage == second) == (rank % 2 == 1))
        o.backward(stage, split)
    for _ in range(p - rank - 1):
        o.catch_up()
        o.backward(first, split)
    for _ in range(rank + 1):
        o.catch_up()
    return o.passes


@cache
def passes(schedule: str, pipeline: int, micro_batches: int) -> list[tuple[int, int, int]]:
    """All ranks' passes in an order in which none waits for a later one: (cost: index of the kind x stages + stage; the rank's
    pass before; the pass that its input comes from), these two numbered from one, 0 for none."""
    stages, last = 2 * pipeline, 2 * pipeline - 1
    orders = [order(schedule, pipeline, micro_batches, rank) for rank in range(pipeline)]
    done, before, found = [0] * pipeline, [0] * pipeline, list[tuple[int, int, int]]()
    forward, inner = ([0] * (stages * micro_batches) for _ in "FI")  # numbers of the passes that others wait for
    running = True
    while running:
        running = False
        for rank, mine in enumerate(orders):
            at, previous = done[rank], before[rank]
            while at < len(mine):
                kind, stage, i = mine[at]
                source, place = 0, stage * micro_batches + i
                if kind == "F":
                    if stage and not (source := forward[place - micro_batches]):
                        break
                elif kind != "W" and stage < last and not (source := inner[place + micro_batches]):
                    break
                found.append((_INDEX[kind] * stages + stage, previous, source))
                previous = len(found)
                if kind == "F":
                    forward[place] = previous
                elif kind != "W":
                    inner[place] = previous
                at += 1
            running = running or at > done[rank]
            done[rank], before[rank] = at, previous
    assert all(at == len(mine) for at, mine in zip(done, orders, strict=True)), "the schedule waits for itself"
    return found


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
    parted = sum(each.kind == "W" for rank in range(pipeline) for each in order(schedule, pipeline, few, rank))
    return parted / (2 * pipeline * micro_batches)


def in_flight(schedule: str, pipeline: int, micro_batches: int, rank: int) -> tuple[int, int]:
    """Micro-batches of each of the rank's two stages, in model order, between forward pass and the gradients of their weights,
    when they are the most in all: those of the warm-up, after which a pass comes for each that goes."""
    first = 2 * pipeline - rank - (schedule == "zb_v")
    return min(micro_batches, first), min(micro_batches, rank + 1)
