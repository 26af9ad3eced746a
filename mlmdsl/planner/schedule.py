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

from collections.abc import Collection
from functools import cache, lru_cache
from itertools import accumulate, combinations, product
from typing import NamedTuple, Protocol, get_args

from mlmdsl.grammar.constraints import ZEROS
from mlmdsl.planner import zero_bubble
from mlmdsl.planner.plan import Recompute, Schedule

Course = tuple[Schedule, int]  # a schedule, and its virtual stages a rank
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
    return tuple(s for s in range(pipeline * interleave) if pipeline_rank(schedule, pipeline, s) == rank)


def hands_on(schedule: Schedule, pipeline: int, interleave: int, stage: int) -> bool:
    """Whether a stage sends what it makes to another rank."""
    if stage + 1 == pipeline * interleave:
        return False
    return pipeline_rank(schedule, pipeline, stage) != pipeline_rank(schedule, pipeline, stage + 1)


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


@cache
def interleaved(pipeline: int, interleave: int, micro_batches: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """Of the interleaved schedule with several rounds: what each of the rank's stages holds when the first one holds the most,
    and when the last one does. In a round passes go through the stages, backward passes from the last one on; counts change
    their course where a forward or a backward pass turns to another stage."""
    each, first = micro_batches // rounds(pipeline, micro_batches), warm_up(pipeline, interleave, micro_batches, rank)
    end = min(micro_batches * interleave, first + 2 * each * interleave)
    turns = (turn for start in (0, first) for turn in (*range(start, end, each), end))
    times = sorted({time for turn in turns for time in (turn - 1, turn) if first <= time < end})

    def passed(passes: int, nth: int) -> int:
        whole, rest = divmod(passes, each * interleave)
        return whole * each + min(max(rest - nth * each, 0), each)

    found = [
        tuple(passed(time + 1, stage) - passed(time - first, interleave - 1 - stage) for stage in range(interleave))
        for time in times
    ]
    return tuple(dict.fromkeys(max(found, key=lambda counts: counts[i]) for i in (0, -1))) if found else ()


@cache
def least_in_flight(schedule: Schedule, pipeline: int, interleave: int, micro_batches: int) -> Fullest:
    """Of the ranks' counts c: 1 / sum(1 / c), and this over the largest. A rank that keeps k bytes for a micro-batch holds c k
    or more, so the fullest of ranks that keep K bytes together holds at least K / sum(1 / c)."""
    counts = [_least_count(schedule, pipeline, interleave, micro_batches, rank) for rank in range(pipeline)]
    share = 1 / sum(1 / count for count in counts)
    fewest = 0 if pipeline == 1 else 2 * interleave - 1 - (schedule in V_SHAPED)  # of the first rank's stages, or the last's
    return Fullest(share, share / max(counts), fewest, 2 * (pipeline * interleave - 1) / pipeline)


def _least_count(schedule: Schedule, pipeline: int, interleave: int, micro_batches: int, rank: int) -> float:
    """Of more than two stages of an interleaved schedule the mean, larger counts going with larger stages (Chebyshev's sum
    inequality). Where stages have their own counts the smallest; of two, some moment is as full as any mean of moments is."""
    each = in_flight(schedule, pipeline, interleave, micro_batches, rank)
    if schedule in V_SHAPED or (schedule == "interleaved_1f1b" and rounds(pipeline, micro_batches) == 1):
        return min(each)
    if schedule == "interleaved_1f1b" and interleave == 2:
        return _evenest(interleaved(pipeline, interleave, micro_batches, rank))
    return sum(each) / len(each)


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


@cache
def least_of(courses: tuple[Course, ...], pipeline: int, micro_batches: int) -> tuple[tuple[bool, Fullest], ...]:
    """Under any of the schedules: of those without and with sums while a rank is full, if there are some."""
    found: list[tuple[bool, Fullest]] = []
    for summed in (False, True):
        mine = [course for course in courses if sums_while_full(course[0], pipeline, micro_batches) == summed]
        each = [least_in_flight(schedule, pipeline, interleave, micro_batches) for schedule, interleave in mine]
        if each:
            found.append((summed, Fullest(*map(min, zip(*each, strict=True)))))
    return tuple(found)


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
    if turns > _ROUNDS:
        each = micro_batches // turns
        most, less = (_interleaved(runs, each * n, pipeline, interleave) for n in (_ROUNDS, _ROUNDS - 1))
        return max(most + (turns - _ROUNDS) * (most - less), _busiest(runs, micro_batches, pipeline))
    seconds = [f for n, f, _, _ in runs for _ in range(n)] + [b for n, _, b, _ in runs for _ in range(n)]
    ends = [0.0]
    for cost, one, other in _passes_in_order(pipeline, interleave, micro_batches):
        free, arrived = ends[one], ends[other]
        ends.append((free if free > arrived else arrived) + seconds[cost])
    return max(ends)


def _busiest(runs: Runs, micro_batches: int, pipeline: int) -> float:
    """Of the ranks the longest time from the step's beginning to its end: the way to it and from it, and its own work."""
    costs = [f + b for count, f, b, _ in runs for _ in range(count)]
    return max(sum(costs[:rank]) + micro_batches * sum(costs[rank::pipeline]) for rank in range(pipeline))


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


@cache
def _passes_in_order(pipeline: int, interleave: int, micro_batches: int) -> list[tuple[int, int, int]]:
    """The passes of an interleaved schedule in an order in which none waits for a later one: (stage, counted on for backward
    passes; the rank's pass before; the pass that its input comes from), these two numbered from one, 0 for none."""
    stages, turns = pipeline * interleave, rounds(pipeline, micro_batches)
    each = micro_batches // turns
    period = max(each, pipeline)  # from a rank's virtual stage to its next
    last = (interleave - 1) * period + 2 * (pipeline - 1)  # from a forward pass on the first rank to the backward pass there
    slots: list[int] = []  # of a pass its time, cost and micro-batch, as one number
    later, sooner = (4 * stages + 1) * micro_batches, (1 - 4 * stages) * micro_batches
    for turn, place, nth in product(range(turns), range(each), range(interleave)):
        i, slot = turn * each + place, (turn * interleave + nth) * period + place
        forward, backward = nth * pipeline, stages + (interleave - 1 - nth) * pipeline
        down = (2 * slot * 2 * stages + forward) * micro_batches + i
        slots.extend(range(down, down + pipeline * later, later))  # a rank later each
        back = ((2 * (slot + last) + 1) * 2 * stages + backward) * micro_batches + i
        slots.extend(range(back, back + pipeline * sooner, sooner))
    slots.sort()
    before, found = [0] * pipeline, list[tuple[int, int, int]]()
    numbers = [0] * (2 * stages * micro_batches)
    sources = [*range(-1, stages - 1), *range(stages + 1, 2 * stages), stages - 1]
    for number, slot in enumerate(slots, 1):
        at = slot % (2 * stages * micro_batches)
        cost, i = divmod(at, micro_batches)
        rank, source = cost % pipeline, sources[cost]
        found.append((cost, before[rank], numbers[source * micro_batches + i] if source >= 0 else 0))
        before[rank] = numbers[at] = number
    return found
