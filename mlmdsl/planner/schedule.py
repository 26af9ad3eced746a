"""Time of the micro-batches of one step through the pipeline: closed forms for the search, an event simulation for the plan.

Both take each virtual stage's forward and backward seconds, sends included: a stage sends before it goes on, as torch's
schedules do, so that its neighbour starts when the stage is done.

    gpipe              all forward passes, then all backward passes (Huang et al. 2019, arXiv:1811.06965) 1f1b               one
    forward, one backward after a warm-up (Narayanan et al. 2019, PipeDream) interleaved_1f1b   the same over several virtual
    stages per rank (Narayanan et al. 2021, arXiv:2104.04473, section 2.2), with torch's
                       rounds for numbers of micro-batches that the pipeline does not divide
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from mlmdsl.planner.plan import Schedule


def executable(schedule: Schedule, pipeline: int, micro_batches: int) -> bool:
    """torch's own conditions: Schedule1F1B wants as many micro-batches as stages; ScheduleInterleaved1F1B whole rounds."""
    if schedule == "1f1b":
        return pipeline == 1 or micro_batches >= pipeline
    if schedule == "interleaved_1f1b":
        return micro_batches % rounds(pipeline, micro_batches) == 0
    return True


def cannot_run(schedule: Schedule, pipeline: int, micro_batches: int) -> str:
    """Of a schedule that is not executable."""
    return f"{schedule} over {pipeline} stages cannot run {micro_batches} micro-batch{'' if micro_batches == 1 else 'es'}"


def rounds(pipeline: int, micro_batches: int) -> int:
    """Of an interleaved schedule: in each, a rank runs one virtual stage for all micro-batches of the round, then the next."""
    return max(1, micro_batches // pipeline)


# ---- micro-batches held ---------------------------------------------------------------------------------------------


@cache
def in_flight(schedule: Schedule, pipeline: int, interleave: int, micro_batches: int, rank: int) -> tuple[int, ...]:
    """Most micro-batches of each of the rank's virtual stages between forward and backward pass at one time, in order."""
    if schedule == "gpipe":
        return (micro_batches,)
    if schedule == "1f1b":
        return (min(micro_batches, pipeline - rank),)
    each = micro_batches // rounds(pipeline, micro_batches)
    done = min(warm_up(pipeline, interleave, micro_batches, rank) + 1, micro_batches * interleave)
    whole, rest = divmod(done, each * interleave)
    return tuple(whole * each + min(max(rest - i * each, 0), each) for i in range(interleave))


def warm_up(pipeline: int, interleave: int, micro_batches: int, rank: int) -> int:
    """Forward passes of a rank before its first backward pass (less the one that directly precedes it): torch's and Megatron's
    count."""
    each = micro_batches // rounds(pipeline, micro_batches)
    return min((interleave - 1) * each + 2 * (pipeline - 1 - rank), micro_batches * interleave)


# ---- closed forms ---------------------------------------------------------------------------------------------------

Runs = Sequence[tuple[int, float, float]]  # stages in a row that are alike: how many, forward seconds, backward seconds


def pipeline_seconds(schedule: Schedule, runs: Runs, micro_batches: int, pipeline: int, interleave: int) -> float:
    """From the first forward to the last backward pass. Exact for gpipe, and for equal stages; otherwise the longest of the
    simple paths through the schedule, which the simulation exceeds by little."""
    if pipeline == 1:
        return micro_batches * sum(count * (f + b) for count, f, b in runs)
    if schedule == "gpipe":
        total = sum(count * (f + b) for count, f, b in runs)
        return total + (micro_batches - 1) * (max(f for _, f, _ in runs) + max(b for _, _, b in runs))
    if schedule == "1f1b":
        return _one_forward_one_backward(runs, micro_batches, pipeline)
    return _interleaved(runs, micro_batches, pipeline, interleave)


def _one_forward_one_backward(runs: Runs, micro_batches: int, pipeline: int) -> float:
    """The first micro-batch goes down and up again; stage s is then busy with m - (p - s) more, after whose last forward pass
    the way leads down and up once more from s: max over s of (m - p + s) c_s + the sum of c below s."""
    total = sum(count * (f + b) for count, f, b in runs)
    longest, stage, below = 0.0, 0, total
    for count, f, b in runs:
        stage += count
        below -= count * (f + b)
        longest = max(longest, (micro_batches - pipeline + stage - 1) * (f + b) + below)
    return total + longest


def _interleaved(runs: Runs, micro_batches: int, pipeline: int, interleave: int) -> float:
    """A rank's own work, and the way to it from the first rank and from it to the last; with fewer micro-batches than ranks
    every virtual stage but the last waits for the round to come about."""
    costs = [f + b for count, f, b in runs for _ in range(count)]
    ahead, longest = 0.0, 0.0
    behind = sum(costs[-pipeline:])
    held = max(micro_batches, pipeline)
    for rank in range(pipeline):
        behind -= costs[rank - pipeline]
        own = held * sum(costs[rank:-pipeline:pipeline]) + micro_batches * costs[rank - pipeline]
        longest = max(longest, ahead + own + behind)
        ahead += costs[rank]
    return longest


# ---- simulation -----------------------------------------------------------------------------------------------------


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
