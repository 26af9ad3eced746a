"""What no plan takes less than: seconds of a step, told before layers are cut into stages, or a micro-batch is looked at.

Work is taken as if it were spread evenly over the pipeline, whose schedule then waits at least

    gpipe               W + (m - 1) W / p
    1f1b                the same; for m = p micro-batches 2 p / (p + 1) W
    interleaved_1f1b    W, and m W / p and the way to the mean rank, down over the shortest of layers and up again
    zb_v, dualpipe_v    W without the gradients of weights, and m W / p and the way down to the mean rank

for W seconds of a micro-batch through all p stages with what they send. (1f1b: of the ways through the schedule that
schedule.py lists, the one that stays on stage s and goes down and up the stages after it takes W + (m - p + s) c_s + c_(s+1) +
.. + c_(p-1). If all of these were shorter than W + (m - 1) W / p, then by induction from the last stage down the c would not
add up to W.) The fullest rank has the mean rank's weights at least, and so exchanges these and steps them. Where pools are
unlike, W is that of the quickest, and `least_uneven` bounds the ranks that work is spread over by their paces.

Seconds of a sequence do not grow with the micro-batch: kernels and links are the faster the more there is to do at once
(compute.py, communication.py). So one large micro-batch bounds all smaller ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from math import inf
from operator import itemgetter, mul
from typing import NamedTuple

from mlmdsl.planner.communication import collective_seconds
from mlmdsl.planner.moments import reduces_each_pass
from mlmdsl.planner.plan import Schedule
from mlmdsl.planner.pools import group_on
from mlmdsl.planner.pricing import Bench, Place, States, Sums
from mlmdsl.planner.proportion import Paces
from mlmdsl.planner.schedule import V_SHAPED, Course

# Sums of the same numbers in another order differ in their last digits, and plans are compared by nine (outcome.py)
_ROUNDED = 1 - 1e-8
# Rows that are shared out evenly are whole numbers: of large micro-batches they may be a few more than of small ones
_WHOLE = 1 - 1e-6


class Overhead(NamedTuple):
    """Seconds of exchanges and the optimizer that nothing hides: once a step, and for every pass of a stage."""

    once: float
    each: float


def least_pipeline(
    schedule: Schedule,
    sums: Sums,
    send: float,
    micro_batches: int,
    pipeline: int,
    interleave: int,
    layers: int = 0,
    idle: float = 1.0,
) -> float:
    """Seconds of all micro-batches; `send`: of one hand-over between stages; `layers`: of the model, of which some rank has its
    whole share; `idle`: what is left of the time that ranks wait for each other (host.py)."""
    m, p = micro_batches, pipeline
    if p == 1:
        return m * (sums.forward + sums.backward)
    crossings = 2 * p - 2 if schedule in V_SHAPED else p * interleave - 1
    whole = sums.forward + sums.backward + 2 * crossings * send
    busy = m * whole / p
    fullest = m * -(-layers // p) * sums.quickest
    return busy + idle * (max(_through(schedule, sums, send, whole, m, p), fullest) - busy)


def _through(schedule: Schedule, sums: Sums, send: float, whole: float, m: int, p: int) -> float:
    """From the first pass to the last where nobody shares cores; `whole`: seconds of a micro-batch through all stages."""
    if schedule in V_SHAPED:
        return max(whole - sums.weight, m * whole / p + (p - 1) / 2 * (sums.quickest_forward + send))
    if schedule == "interleaved_1f1b":
        return max(whole, m * whole / p + (p - 1) / 2 * (sums.quickest + send))
    if schedule == "1f1b" and m == p:
        return whole * 2 * p / (p + 1)
    return whole + (m - 1) * whole / p


class Share(NamedTuple):
    """A way of ZeRO on a place: what it takes in time, and in state at least."""

    overhead: Overhead
    states: States


def share_of(place: Place, zero: int, replicate: int) -> Share:
    return Share(overhead_of(place, zero, replicate), place.least_states(zero, replicate))


def least_uneven(schedule: Schedule, sums: Sums, send: float, micro_batches: int, paces: Paces) -> float:
    """Seconds of all micro-batches where ranks differ in pace. Ranks that are busy with a micro-batch for c_s seconds do
    sum(c_s pace_s) of its work w at the most: weighted by pace, the mean of c_s is w / sum(pace) at least. No schedule is
    shorter than any of these, for every s, nor than their mean:

        gpipe               W + (m - 1) c_s
        interleaved_1f1b    m c_s and the way to s, down over the shortest of layers and up again
        zb_v, dualpipe_v    m c_s and the way down to s
        1f1b                W + (m - p + s) c_s + c_(s+1) + .. + c_(p-1), weighted so that each c_t counts at its pace
    """
    m, p, total = micro_batches, len(paces.ranks), sum(paces.ranks)
    mean, whole = paces.work / total, sums.forward + sums.backward + 2 * (p - 1) * send
    if schedule == "gpipe":
        return whole + (m - 1) * mean
    if schedule == "1f1b":
        weights = 0.0
        for rank, pace in enumerate(paces.ranks if m > p else ()):
            weights += max(0.0, pace - weights) / (m - p + rank)
        return whole + paces.work / weights if weights else m * mean
    way = send + (sums.quickest_forward if schedule in V_SHAPED else sums.quickest)
    return m * mean + way * sum(rank * pace for rank, pace in enumerate(paces.ranks)) / total


def overhead_of(place: Place, zero: int, replicate: int) -> Overhead:
    """Of the rank with the mean rank's weights; where pools are unlike, the least of any of them."""
    each = [_overhead_on(place, bench, zero, replicate) for bench in place.distinct]
    return Overhead(min(overhead.once for overhead in each), min(overhead.each for overhead in each))


def _overhead_on(place: Place, bench: Bench, zero: int, replicate: int) -> Overhead:
    setting, site, replicas, pipeline = bench.setting, bench.site, place.replicas, place.pipeline
    execution, kernels = setting.execution, site.kernels
    held = place.bench.holdings.of(setting.chain.whole[0])
    elements, experts = held.elements / pipeline, held.experts / pipeline
    each_element = place.optimizer_bytes
    if replicas == 1:
        return Overhead(kernels.optimizer_seconds(each_element * (elements + experts)), 0.0)
    mesh = place.mesh_of(replicate)
    shards = replicas // replicate
    group = group_on(site, mesh, "replicas" if replicate == 1 else "shards")
    summed = execution.gradient_bytes * elements
    of_experts = 0.0
    if experts:
        kind = "reduce_scatter" if zero else "all_reduce"
        of_experts = collective_seconds(kind, 4 * experts, group_on(site, mesh, "copies"))
    hidden = place.taken  # of what runs beside kernels, what it takes at least
    if not zero:
        reduced = collective_seconds("all_reduce", summed, group)
        share = hidden if execution.overlapped_sums and pipeline == 1 else 1.0
        step = kernels.optimizer_seconds(each_element * (elements + experts))
        return Overhead(share * reduced + of_experts + step, 0.0)
    step = kernels.optimizer_seconds(each_element * elements / shards)
    reduced = collective_seconds("reduce_scatter", summed, group)
    gathered = collective_seconds("all_gather", setting.width * elements, group)
    passes = hidden * reduced * reduces_each_pass(zero, pipeline > 1) + hidden * gathered * (zero == 3) * (1 + (pipeline == 1))
    once = 0.0
    if not reduces_each_pass(zero, pipeline > 1):
        once = reduced * (1.0 if pipeline > 1 else hidden)
    return Overhead(once + of_experts + step, passes)


def least_seconds(
    place: Place,
    overheads: Sequence[Overhead],
    micro_batch: int,
    mode: int,
    courses: tuple[Course, ...],
    excess: float = 0.0,
    dear: int = 0,
) -> float:
    """Of a step, under a way of recomputing and the quickest ways of ZeRO and schedules. `excess`: bytes that layers under a
    dearer way keep less, each of which costs as little as it can."""
    m, send, sums = place.micro_batches(micro_batch), place.least_send(micro_batch), place.sums(micro_batch, mode)
    layers = place.bench.setting.chain.count
    paces = None if place.alike else place.paces(micro_batch, mode)
    if excess:
        ranks = place.benches[:1] if place.alike else place.benches
        costs = [bench.seconds_for_bytes(micro_batch, mode, dear) for bench in ranks]
        sums = sums._replace(backward=sums.backward + excess * min(costs))
        if paces is not None:
            paces = paces._replace(work=paces.work + excess * min(map(mul, costs, paces.ranks)))
    best = inf
    for schedule, interleave in _quickest(courses):
        around = _around(overheads, m * interleave)
        passes = least_pipeline(schedule, sums, send, m, place.pipeline, interleave, layers, place.idle_share)
        if paces is not None:
            passes = max(passes, least_uneven(schedule, sums, send, m, paces))
        best = min(best, around + passes)
    return _ROUNDED * (best + place.sync_seconds)


def least_with(place: Place, overheads: Sequence[Overhead], micro_batch: int, interleave: int, passes: float) -> float:
    """Of a step whose way through the pipeline is known, under the quickest way of ZeRO."""
    around = _around(overheads, place.micro_batches(micro_batch) * interleave)
    return _ROUNDED * (passes + around + place.sync_seconds)


def _around(overheads: Sequence[Overhead], passes: int) -> float:
    return min([once + passes * each for once, each in overheads])


@cache
def _quickest(courses: tuple[Course, ...]) -> tuple[Course, ...]:
    """Of each schedule the one with the fewest virtual stages."""
    return tuple(dict(sorted(courses, key=itemgetter(1), reverse=True)).items())


def least_blended(
    place: Place, share: Share, micro_batch: int, ways: Iterable[tuple[int, int]], courses: tuple[Course, ...]
) -> float:
    """Of a step that recomputes some layers in a dear way and the others in a mild one, (mild, dear), as few as its memory
    allows under one of these ways of ZeRO and schedules."""
    best = inf
    for mild, dear in ways:
        excess = place.least_excess(micro_batch, mild, dear, courses, share.states)
        best = min(best, least_seconds(place, (share.overhead,), micro_batch, mild, courses, excess, dear))
    return best


def least_from(place: Place, overheads: Iterable[Overhead], micro_batch: int) -> float:
    """Of a step with this micro-batch or a larger one."""
    largest, rows, p = place.bench.setting.spec.train.batch, place.micro_batches(1), place.pipeline
    sums, m = place.sums(largest, 0), rows // micro_batch
    once = min(once + each for once, each in overheads)
    around = once + place.sync_seconds
    if p == 1:
        return _WHOLE * (rows * (sums.forward + sums.backward) / largest + around)
    send = place.least_send(largest) / largest
    whole = (sums.forward + sums.backward) / largest + 2 * (p - 1) * send
    down = (p - 1) / 2 * (sums.quickest_forward / largest + send)
    passes = rows / p * whole + place.idle_share * rows / m * down
    if place.idle_share == 1.0:
        passes = max(passes, rows / largest * -(-place.bench.setting.chain.count // p) * sums.quickest)
    if not place.alike:
        work, paces = place.paces(largest, 0)
        passes = max(passes, rows / largest * work / sum(paces))
    return _WHOLE * (passes + around)
