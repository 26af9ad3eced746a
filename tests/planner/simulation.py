"""Schedules action by action, in the order of torch's own, and when each action starts and ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlmdsl.planner.plan import Schedule
from mlmdsl.planner.schedule import rounds, warm_up


@dataclass(frozen=True, slots=True)
class Action:
    """One pass of one micro-batch through one virtual stage."""

    backward: bool
    stage: int
    micro_batch: int


def actions(schedule: Schedule, pipeline: int, interleave: int, micro_batches: int, rank: int) -> list[Action]:
    """What a rank does, in order."""
    if schedule == "gpipe":
        order = [(False, i) for i in range(micro_batches)] + [(True, i) for i in range(micro_batches)]
        return [Action(backward, rank, i) for backward, i in order]
    if schedule == "1f1b":
        ahead = min(micro_batches, pipeline - rank)
        return [Action(backward, rank, i) for backward, i in _alternating(ahead, micro_batches)]
    return list(_interleaved_actions(pipeline, interleave, micro_batches, rank))


def _alternating(ahead: int, micro_batches: int) -> Iterator[tuple[bool, int]]:
    """`ahead` forward passes, then backward and forward in turn."""
    yield from ((False, i) for i in range(ahead))
    for i in range(micro_batches):
        yield True, i
        if ahead + i < micro_batches:
            yield False, ahead + i


def _interleaved_actions(pipeline: int, interleave: int, micro_batches: int, rank: int) -> Iterator[Action]:
    each = micro_batches // rounds(pipeline, micro_batches)
    total = micro_batches * interleave
    ahead = warm_up(pipeline, interleave, micro_batches, rank)

    def nth(n: int, backward: bool) -> Action:
        local = n // each % interleave
        turn, place = n // (each * interleave), n % each
        stage = (interleave - 1 - local if backward else local) * pipeline + rank
        return Action(backward, stage, turn * each + place)

    for n in range(total + ahead):
        if n < total:
            yield nth(n, False)
        if n >= ahead:
            yield nth(n - ahead, True)


@dataclass(frozen=True)
class Timeline:
    """When each rank's actions start and end, in seconds from the step's beginning."""

    ranks: tuple[tuple[tuple[Action, float, float], ...], ...]

    @property
    def seconds(self) -> float:
        return max(rank[-1][2] for rank in self.ranks)

    def busy_seconds(self, rank: int) -> float:
        return sum(end - start for _, start, end in self.ranks[rank])


def simulate(
    schedule: Schedule, forward: Sequence[float], backward: Sequence[float], micro_batches: int, pipeline: int, interleave: int
) -> Timeline:
    """Every action starts when its rank is free and its input is there. `forward` and `backward` by virtual stage."""
    orders = [actions(schedule, pipeline, interleave, micro_batches, rank) for rank in range(pipeline)]
    last = len(forward) - 1
    ends: dict[tuple[bool, int, int], float] = {}
    done: list[list[tuple[Action, float, float]]] = [[] for _ in orders]
    waiting = list(range(pipeline))
    while waiting:
        progress = False
        for rank in waiting:
            order, mine = orders[rank], done[rank]
            clock = mine[-1][2] if mine else 0.0
            while len(mine) < len(order):
                action = order[len(mine)]
                arrived = _arrival(action, last, ends)
                if arrived is None:
                    break
                start = max(clock, arrived)
                clock = start + (backward if action.backward else forward)[action.stage]
                ends[action.backward, action.stage, action.micro_batch] = clock
                mine.append((action, start, clock))
                progress = True
        assert progress, "the schedule waits for itself"
        waiting = [rank for rank in waiting if len(done[rank]) < len(orders[rank])]
    return Timeline(tuple(map(tuple, done)))


def _arrival(action: Action, last: int, ends: dict[tuple[bool, int, int], float]) -> float | None:
    """When its input is there; None while the pass that makes it has not run."""
    stage, i = action.stage, action.micro_batch
    if action.backward:
        return ends.get((False, stage, i)) if stage == last else ends.get((True, stage + 1, i))
    return 0.0 if stage == 0 else ends.get((False, stage - 1, i))
