"""Time of the micro-batches of one step through the pipeline, and how many a stage holds: closed forms.

They take each virtual stage's forward and backward seconds, sends included: a stage sends before it goes on, as torch's
schedules do, so that its neighbour starts when the stage is done.

    gpipe: all forward passes, then all backward passes (Huang et al. 2019, arXiv:1811.06965)
    1f1b: one forward, one backward after a warm-up (Narayanan et al. 2019, PipeDream)
    interleaved_1f1b: the same over several virtual stages per rank (Narayanan et al. 2021, arXiv:2104.04473, section 2.2),
        with torch's rounds for numbers of micro-batches that the pipeline does not divide
    zb_v, dualpipe_v: zero_bubble.py
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache, lru_cache
from itertools import accumulate, combinations, pairwise
from typing import NamedTuple, Protocol, get_args

from mlmdsl.grammar.constraints import ZEROS
from mlmdsl.planner import interleaved, zero_bubble
from mlmdsl.planner.plan import Recompute, Schedule

Course = tuple[Schedule, int]  # a schedule, and its virtual stages a rank
Full = tuple[tuple[Course, int], ...]  # schedules, each with so many micro-batches
V_SHAPED: tuple[Schedule, ...] = ("zb_v", "dualpipe_v")  # two stages on a rank: down over the ranks, and back
_ROUNDS = 4  # of an interleaved schedule, after which rounds are alike
_STEADY = 4  # micro-batches per rank of a V, after which one takes as long as the next


# ---- stages and ranks -----------------------------------------------------------------------------------------------


def pipeline_rank(schedule: Schedule, pipeline: int, stage: int) -> int:
    """Where a virtual stage runs: round and round, or in a V."""
    turn, place = divmod(stage, pipeline)
    return pipeline - 1 - place if turn % 2 and schedule in V_SHAPED else place


@cache
def stages_of(schedule: Schedule, pipeline: int, interleave: int, rank: int) -> tuple[int, ...]:
    """The virtual stages of a rank, in model order."""
    ways = ((turn * pipeline, schedule in V_SHAPED and turn % 2 == 1) for turn in range(interleave))
    return tuple(start + (pipeline - 1 - rank if back else rank) for start, back in ways)


@cache
def links(schedule: Schedule, pipeline: int, interleave: int) -> tuple[tuple[bool, bool], ...]:
    """By virtual stage, whether it is given its input by another rank, and hands its output to one."""
    ranks = [pipeline_rank(schedule, pipeline, stage) for stage in range(pipeline * interleave)]
    crosses = [False, *(one != other for one, other in pairwise(ranks)), False]
    return tuple(pairwise(crosses))


# ---- what torch can run ---------------------------------------------------------------------------------------------


def virtual_stages(schedule: Schedule, interleave: int) -> bool:
    """Whether the schedule has so many on each rank."""
    if schedule in V_SHAPED:
        return interleave == 2
    return (interleave > 1) == (schedule == "interleaved_1f1b")


def recomputes(schedule: Schedule) -> tuple[Recompute, ...]:
    """Those that the schedule goes with. Where backward passes are taken apart, what is recomputed for the gradients of inputs
    would be recomputed for those of weights, which torch's selective checkpointing refuses."""
    return ("none",) if schedule in V_SHAPED else get_args(Recompute)


def zeros(schedule: Schedule) -> tuple[int, ...]:
    """Those that the schedule goes with. Where backward passes are taken apart, FSDP2 with ZeRO 3 lets go of the weights in
    between (gradients came out wrong by their own size: torch 2.11 and 2.13), and sums gradients before those of weights are
    there."""
    return (0, 1) if schedule in V_SHAPED else ZEROS


def executable(schedule: Schedule, pipeline: int, micro_batches: int) -> bool:
    """torch's own conditions: Schedule1F1B wants as many micro-batches as stages, ScheduleDualPipeV as many as virtual ones;
    ScheduleInterleaved1F1B whole rounds."""
    if schedule == "1f1b":
        return pipeline == 1 or micro_batches >= pipeline
    if schedule == "dualpipe_v":
        return micro_batches >= 2 * pipeline
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
    if schedule in V_SHAPED:
        return zero_bubble.in_flight(schedule, pipeline, min(micro_batches, _STEADY * pipeline), rank)
    each = micro_batches // rounds(pipeline, micro_batches)
    done = min(warm_up(pipeline, interleave, micro_batches, rank) + 1, micro_batches * interleave)
    whole, rest = divmod(done, each * interleave)
    return tuple(whole * each + min(max(rest - i * each, 0), each) for i in range(interleave))


class Fullest(NamedTuple):
    """What the fullest rank of a pipeline has at least: of the bytes that all ranks together keep for one micro-batch, and of
    those of their states; and of receive buffers for a micro-batch, in one and the other direction. `buffers`: of these the
    mean rank's."""

    kept: float
    state: float
    received: float
    buffers: float


def extremes(pipeline: int, interleave: int, micro_batches: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """Of the interleaved schedule with several rounds: what each of the rank's stages holds when the first one holds the most,
    and when the last one does. What they hold after a round of backward passes, they held before it."""
    each, ahead = micro_batches // rounds(pipeline, micro_batches), warm_up(pipeline, interleave, micro_batches, rank)
    end = min(micro_batches * interleave, ahead + each * interleave)
    return interleaved.extremes(each, interleave, ahead, end)


def least_in_flight(schedule: Schedule, pipeline: int, interleave: int, micro_batches: int) -> Fullest:
    """Of the ranks' counts c: 1 / sum(1 / c), and this over the largest. A rank that keeps k bytes for a micro-batch holds c k
    or more, so the fullest of ranks that keep K bytes together holds at least K / sum(1 / c)."""
    return _least_in_flight(schedule, pipeline, interleave, _as_full(schedule, pipeline, micro_batches))


@cache
def all_full(courses: tuple[Course, ...], pipeline: int, micro_batches: int) -> Full:
    """Of each of some schedules, as few micro-batches as ranks hold as many of."""
    return tuple((course, _as_full(course[0], pipeline, micro_batches)) for course in courses)


def _as_full(schedule: Schedule, pipeline: int, micro_batches: int) -> int:
    """Those of the warm-up and one more, or of a few rounds."""
    if schedule == "1f1b":
        return min(micro_batches, pipeline + 1)
    if schedule in V_SHAPED:
        return min(micro_batches, 2 * pipeline)
    if schedule == "interleaved_1f1b":
        turns = rounds(pipeline, micro_batches)
        return micro_batches // turns * min(turns, 3)
    return micro_batches


@cache
def _least_in_flight(schedule: Schedule, pipeline: int, interleave: int, micro_batches: int) -> Fullest:
    counts = least_counts(schedule, pipeline, interleave, micro_batches)
    share = 1 / sum(1 / count for count in counts)
    fewest = 0 if pipeline == 1 else 2 * interleave - 1 - (schedule in V_SHAPED)  # of the first rank's stages, or the last's
    return Fullest(share, share / max(counts), fewest, 2 * (pipeline * interleave - 1) / pipeline)


def least_counts(schedule: Schedule, pipeline: int, interleave: int, micro_batches: int) -> Sequence[float]:
    """By rank. Of more than two stages of an interleaved schedule the mean, larger counts going with larger stages (Chebyshev's
    sum inequality). Where stages have their own counts the smallest; of two, some moment is as full as any mean of moments
    is."""
    ranks = range(pipeline)
    if schedule == "gpipe":
        return [micro_batches] * pipeline
    if schedule == "1f1b" or schedule in V_SHAPED:
        return [min(in_flight(schedule, pipeline, interleave, micro_batches, rank)) for rank in ranks]
    if rounds(pipeline, micro_batches) == 1:  # those of the last stage
        return [min(micro_batches, 2 * (pipeline - rank) - 1) for rank in ranks]
    if interleave == 2:
        return [_evenest(extremes(pipeline, interleave, micro_batches, rank)) for rank in ranks]
    return [(warm_up(pipeline, interleave, micro_batches, rank) + 1) / interleave for rank in ranks]


def _evenest(moments: Collection[tuple[int, ...]]) -> float:
    """Over all means of moments, the most that the smaller of two counts can be."""
    most = float(max(map(min, moments)))
    largest: list[tuple[int, ...]] = []  # that no other exceeds
    for moment in sorted(moments, reverse=True):
        if not largest or moment[1] > largest[-1][1]:
            largest.append(moment)
    for (a, b), (c, d) in combinations(largest, 2):
        if (a - b) * (c - d) < 0:
            share = (d - c) / (a - b + d - c)
            most = max(most, share * a + (1 - share) * c)
    return most


def sums_while_full(schedule: Schedule, pipeline: int, micro_batches: int) -> bool:
    """Whether each rank has sums of the gradients of all its stages at a time when it holds the most micro-batches: a backward
    pass of each has been by then (moments.py)."""
    if schedule == "1f1b":
        return micro_batches > pipeline
    return schedule == "interleaved_1f1b" and rounds(pipeline, micro_batches) > 1


def least_of(courses: tuple[Course, ...], pipeline: int, micro_batches: int) -> tuple[bool, Fullest]:
    """Of each quantity the least under any of the schedules; whether ranks have sums while they are full under all of them."""
    return _least_of(all_full(courses, pipeline, micro_batches), pipeline)


@cache
def _least_of(full: Full, pipeline: int) -> tuple[bool, Fullest]:
    each = [_least_in_flight(schedule, pipeline, interleave, m) for (schedule, interleave), m in full]
    summed = all(sums_while_full(schedule, pipeline, m) for (schedule, _), m in full)
    return summed, Fullest(*map(min, zip(*each, strict=True)))


def warm_up(pipeline: int, interleave: int, micro_batches: int, rank: int) -> int:
    """Forward passes of a rank before its first backward pass (less the one that directly precedes it): torch's and Megatron's
    count."""
    each = micro_batches // rounds(pipeline, micro_batches)
    return min((interleave - 1) * each + 2 * (pipeline - 1 - rank), micro_batches * interleave)


# ---- closed forms ---------------------------------------------------------------------------------------------------

# Stages in a row that are alike: how many, forward seconds, backward seconds, and what of these goes to gradients of weights
Runs = tuple[tuple[int, float, float, float], ...]


class Clock(Protocol):
    """Seconds of all micro-batches of one step through the pipeline."""

    def __call__(self, schedule: Schedule, runs: Runs, micro_batches: int, pipeline: int, interleave: int) -> float: ...


def pipeline_bound(schedule: Schedule, runs: Runs, micro_batches: int, pipeline: int, interleave: int) -> float:
    """At least this much, quickly told."""
    if schedule == "interleaved_1f1b" and pipeline > 1:
        return max(_busiest(runs, micro_batches, pipeline), sum(count * (f + b) for count, f, b, _ in runs))
    if schedule in V_SHAPED:
        return max(_work(runs, micro_batches, pipeline), sum(count * (f + b - w) for count, f, b, w in runs))
    return pipeline_seconds(schedule, runs, micro_batches, pipeline, interleave)


def pipeline_seconds(schedule: Schedule, runs: Runs, micro_batches: int, pipeline: int, interleave: int) -> float:
    """From the first forward to the last backward pass. Exact; of interleaved schedules of more than a few rounds within a
    twentieth, where stages are balanced."""
    if pipeline == 1:
        return micro_batches * sum(count * (f + b) for count, f, b, _ in runs)
    if schedule == "gpipe":
        total = sum(count * (f + b) for count, f, b, _ in runs)
        return total + (micro_batches - 1) * (max(f for _, f, _, _ in runs) + max(b for _, _, b, _ in runs))
    if schedule == "1f1b":
        return _one_forward_one_backward(runs, micro_batches, pipeline)
    if schedule in V_SHAPED:
        return _in_a_v(schedule, runs, micro_batches, pipeline)
    return _interleaved(runs, micro_batches, pipeline, interleave)


def _one_forward_one_backward(runs: Runs, micro_batches: int, pipeline: int) -> float:
    """The longest way through the schedule stays on one stage s for m - (p - s) micro-batches, c = f + b seconds each. It comes
    there by way of the first micro-batch, down to some stage t and up again; the p - 1 - t micro-batches that t has not waited
    for run ahead of it, one forward pass each, on the slowest stage so far. It leaves in the same way, with backward passes.

        max over s of  c_0 + .. + c_s + (m - p + s) c_s + way(s, f) + way(s, b)
        way(s, x) = max over t >= s of  c_(s+1) + .. + c_t + (p - 1 - t) max(x_0 .. x_t)

    All are linear within a run of like stages: its two ends suffice."""
    points: list[tuple[int, float, float, float, float]] = []  # stage, its c, the sum up to it, slowest forward and backward
    stage, before, slow_f, slow_b = 0, 0.0, 0.0, 0.0
    for count, f, b, _ in runs:
        slow_f, slow_b = max(slow_f, f), max(slow_b, b)
        for nth in (1, count) if count > 1 else (1,):
            points.append((stage + nth - 1, f + b, before + nth * (f + b), slow_f, slow_b))
        stage += count
        before += count * (f + b)
    longest = way_f = way_b = 0.0
    for stage, c, upto, slow_f, slow_b in reversed(points):
        way_f = max(way_f, upto + (pipeline - 1 - stage) * slow_f)
        way_b = max(way_b, upto + (pipeline - 1 - stage) * slow_b)
        longest = max(longest, (micro_batches - pipeline + stage) * c + way_f + way_b - upto)
    return longest


@lru_cache(maxsize=4096)
def _interleaved(runs: Runs, micro_batches: int, pipeline: int, interleave: int) -> float:
    """The longest way through a few rounds, pass by pass; rounds after them take as long as the last of these, if none of the
    ranks is busy for longer."""
    turns = rounds(pipeline, micro_batches)
    forward = [f for count, f, _, _ in runs for _ in range(count)]
    backward = [b for count, _, b, _ in runs for _ in range(count)]
    few = (turns,) if turns <= _ROUNDS else (_ROUNDS - 1, _ROUNDS)
    found = interleaved.seconds(forward, backward, micro_batches // turns, few, pipeline)
    if turns <= _ROUNDS:
        return found[0]
    less, most = found
    return max(most + (turns - _ROUNDS) * (most - less), _busiest(runs, micro_batches, pipeline))


@lru_cache(maxsize=4096)
def _busiest(runs: Runs, micro_batches: int, pipeline: int) -> float:
    """Of the ranks the longest time from the step's beginning to its end: the way to it and from it, and its own work."""
    costs = [f + b for count, f, b, _ in runs for _ in range(count)]
    work = map(sum, zip(*(costs[start : start + pipeline] for start in range(0, len(costs), pipeline)), strict=True))
    ways = accumulate(costs[: pipeline - 1], initial=0.0)
    return max(way + micro_batches * own for way, own in zip(ways, work, strict=True))


@lru_cache(maxsize=4096)
def _in_a_v(schedule: Schedule, runs: Runs, micro_batches: int, pipeline: int) -> float:
    """The longest way, pass by pass; after some micro-batches each takes as long as the last, or as a rank is busy with it."""
    f, b, w = ([run[i] for run in runs for _ in range(run[0])] for i in (1, 2, 3))
    few = min(micro_batches, _STEADY * pipeline)
    found = zero_bubble.seconds(schedule, f, b, w, few, pipeline)
    if micro_batches == few:
        return found
    one = found - zero_bubble.seconds(schedule, f, b, w, few - 1, pipeline)
    return max(found + (micro_batches - few) * one, _work(runs, micro_batches, pipeline))


def _work(runs: Runs, micro_batches: int, pipeline: int) -> float:
    """What a rank of a V has to do after its first input has come down to it, at the most."""
    costs = [f + b for count, f, b, _ in runs for _ in range(count)]
    down = [0.0, *accumulate(f for count, f, _, _ in runs for _ in range(count))]
    return max(down[rank] + micro_batches * (costs[rank] + costs[-1 - rank]) for rank in range(pipeline))
