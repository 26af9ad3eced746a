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
unlike, W is that of the quickest (uneven.py knows more).

Where memory is short, some layers are recomputed: as many as free what some rank has too much of (demand.py), in the ways that
cost least time for it (trade.py). No schedule is shorter than the way by any of its ranks, whose passes recompute what it takes
for that rank alone: by ranks inside the pipeline where layers are alike and balanced, by any where it is known how they are cut
(loads.py).

Seconds of a sequence do not grow with the micro-batch: kernels and links are the faster the more there is to do at once
(compute.py, communication.py). So one large micro-batch bounds all smaller ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from math import ceil, inf
from operator import itemgetter
from typing import NamedTuple

from mlmdsl.planner.bench import Bench, Sums
from mlmdsl.planner.candidate import Candidate
from mlmdsl.planner.communication import collective_seconds
from mlmdsl.planner.demand import Demand, LeastHeld, Line, States, demand_of, held_of, states_of
from mlmdsl.planner.loads import Load
from mlmdsl.planner.moments import reduces_each_pass
from mlmdsl.planner.plan import CollectiveKind, Schedule
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.schedule import V_SHAPED, Course, pipeline_bound
from mlmdsl.planner.trade import Trade

# Sums of the same numbers in another order differ in their last digits, and plans are compared by nine (outcome.py)
ROUNDED = 1 - 1e-8
# Rows that are shared out evenly are whole numbers: of large micro-batches they may be a few more than of small ones
_WHOLE = 1 - 1e-6


class Overhead(NamedTuple):
    """Seconds of exchanges and the optimizer that nothing hides, once a step; of collectives beside the forward and beside the
    backward passes of every micro-batch, and what part of them costs time at least."""

    once: float
    ahead: float
    behind: float
    taken: float

    def beside(self, passes: float, micro_batches: int, forward: float, backward: float) -> float:
        """What all passes take with the collectives, at least; `forward`, `backward`: of a micro-batch, of the mean rank."""
        _, ahead, behind, taken = self
        busy = max(forward + taken * ahead, ahead) + max(backward + taken * behind, behind)
        return max(passes + micro_batches * taken * (ahead + behind), micro_batches * busy)


def least_pipeline(
    schedule: Schedule,
    sums: Sums,
    send: float,
    micro_batches: int,
    pipeline: int,
    interleave: int,
    layers: int = 0,
    idle: float = 1.0,
    longest: float = 0.0,
) -> float:
    """Seconds of all micro-batches; `send`: of one hand-over between stages; `layers`: of the model, of which some rank has its
    whole share; `idle`: what is left of the time that ranks wait for each other (host.py); `longest`: what some way through
    the schedule takes where nobody shares cores."""
    m, p = micro_batches, pipeline
    if p == 1:
        return m * (sums.forward + sums.backward)
    crossings = 2 * p - 2 if schedule in V_SHAPED else p * interleave - 1
    whole = sums.forward + sums.backward + 2 * crossings * send
    busy = m * whole / p
    fullest = m * -(-layers // p) * sums.quickest
    return busy + idle * (max(_through(schedule, sums, send, whole, m, p), fullest, longest) - busy)


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


def shares_of(place: Place, choices: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Share]:
    """By (zero, replicate). Where pools are unlike, the least of any of them."""
    each = [_Traffic(place, bench) for bench in place.distinct]
    found: dict[tuple[int, int], Share] = {}
    for choice in choices:
        overhead = Overhead(*map(min, zip(*(traffic.overhead(*choice) for traffic in each), strict=True)))
        found[choice] = Share(overhead, states_of(place, *choice))
    return found


class _Traffic:
    """Exchanges and the optimizer of a rank with the mean rank's weights on one kind of device."""

    def __init__(self, place: Place, bench: Bench):
        self.place, self.bench, self.kernels = place, bench, bench.site.kernels
        held = place.bench.holdings.of(bench.setting.chain.whole[0])
        self.elements, self.experts = held.elements / place.pipeline, held.experts / place.pipeline
        self._sharded: dict[int, tuple[float, float]] = {}

    def overhead(self, zero: int, replicate: int) -> Overhead:
        place, execution, piped = self.place, self.bench.setting.execution, self.place.pipeline > 1
        hidden = place.taken  # of what runs beside kernels, what it takes at least
        if place.replicas == 1:
            return Overhead(self._optimizer(self.elements + self.experts), 0.0, 0.0, hidden)
        of_experts = 0.0
        if self.experts:
            of_experts = self._seconds("reduce_scatter" if zero else "all_reduce", 4 * self.experts, "copies", replicate)
        if not zero:
            reduced = self._seconds("all_reduce", execution.gradient_bytes * self.elements, "replicas", replicate)
            share = hidden if execution.overlapped_sums and not piped else 1.0
            return Overhead(share * reduced + of_experts + self._optimizer(self.elements + self.experts), 0.0, 0.0, hidden)
        step = of_experts + self._optimizer(self.elements * replicate / place.replicas)
        reduced, gathered = self._over_shards(replicate)
        ahead, behind = gathered * (zero == 3 and not piped), gathered * (zero == 3)
        if reduces_each_pass(zero, piped):
            return Overhead(step, ahead, behind + reduced, hidden)
        return Overhead(step + reduced * (1.0 if piped else hidden), ahead, behind, hidden)

    def _over_shards(self, replicate: int) -> tuple[float, float]:
        """Seconds of a sum of all gradients, and of a gather of all weights."""
        if replicate not in self._sharded:
            setting = self.bench.setting
            reduced = self._layer_by_layer("reduce_scatter", setting.execution.gradient_bytes, replicate)
            gathered = self._layer_by_layer("all_gather", setting.width, replicate)
            self._sharded[replicate] = reduced, gathered
        return self._sharded[replicate]

    def _layer_by_layer(self, kind: CollectiveKind, width: float, replicate: int) -> float:
        """Of a collective of every layer: the mean rank's bytes in as many calls as it has layers; or that of the rank with the
        most layers, at least."""
        place, chain, axis = self.place, self.bench.setting.chain, "replicas" if replicate == 1 else "shards"
        units = place.bench.holdings.units(chain.whole[0], place.replicas // replicate).layers
        each = min((self._seconds(kind, width * size, axis, replicate) for _, size in units), default=0.0)
        fewer = chain.count / place.pipeline - 1 if each and all(size for _, size in units) else 0.0
        mean = self._seconds(kind, width * self.elements, axis, replicate) + fewer * self._seconds(kind, 0, axis, replicate)
        return max(mean, -(-chain.count // place.pipeline) * each)

    def _seconds(self, kind: CollectiveKind, size: float, axis: str, replicate: int) -> float:
        return collective_seconds(kind, size, self.place.group_on(self.bench.site, axis, replicate))

    def _optimizer(self, elements: float) -> float:
        return self.kernels.optimizer_seconds(self.place.optimizer_bytes * elements)


class Rates(NamedTuple):
    """Of a micro-batch under some ways of recomputing: seconds under the mildest, those of the model's beginning and of its
    end, and of a hand-over between stages; what it costs to keep less; what is held besides."""

    sums: Sums
    ends: tuple[float, float]
    send: float
    trade: Trade
    held: LeastHeld


def rates_of(place: Place, micro_batch: int, modes: tuple[int, ...], apart: bool) -> Rates:
    speed = place.bench.speed(micro_batch, modes[0])
    return Rates(
        place.sums(micro_batch, modes[0]),
        (speed.first, speed.last),
        place.least_send(micro_batch),
        place.trade(micro_batch, modes),
        held_of(place, micro_batch, modes, apart),
    )


def least_step(place: Place, share: Share, rates: Rates, micro_batches: int, course: Course, demand: Demand) -> float:
    """Seconds of a step under one schedule, some layers being recomputed in one of the ways and others in another; infinite
    where none of them frees as much memory as it takes."""
    (schedule, interleave), sums = course, rates.sums
    m, p, layers = micro_batches, place.pipeline, place.bench.setting.chain.count
    longer = rates.trade.seconds(rates.trade.kept - min(demand.may_keep(share.states)))
    if longer == inf:
        return inf
    longest = 0.0
    if demand.loaded:

        def through(line: Line, load: Load) -> float:
            return _through_rank(schedule, rates, m, p, load, _longer(rates, share, demand, line, load, layers))

        longest = min(max(through(*rank) for rank in ranks) for ranks in demand.loaded)
        if longest == inf:
            return inf
    sums = sums._replace(backward=sums.backward + longer)
    passes = least_pipeline(schedule, sums, rates.send, m, p, interleave, layers, place.idle_share, longest)
    passes = share.overhead.beside(passes, m, sums.forward / p, sums.backward / p)
    return ROUNDED * (passes + share.overhead.once + place.sync_seconds)


def _longer(rates: Rates, share: Share, demand: Demand, line: Line, load: Load, layers: int) -> float:
    """What the passes of a rank take longer at least than under the mildest way, for it to hold its load: layers of which it
    holds the most micro-batches free the most memory for their time."""
    trade = rates.trade
    over = (trade.kept - line.may_keep(share.states, demand.summed)) * load.total / layers  # bytes of activations
    if over <= 0:
        return 0.0
    edges, longer = trade.edges, 0.0
    whole = len(edges) == 1  # every layer is recomputed in one of two ways
    steps = [(price / count, price, most / layers, count, n) for count, n in load.held for price, most in edges]
    for _, price, freed, count, n in steps if whole else sorted(steps):  # of one edge they are in order
        number = min(n, over / (count * freed))
        if whole:
            number = min(n, ceil(number * (1 - 1e-9)))
        longer += price * freed * number
        over -= count * freed * number
        if over <= 0:
            return longer
    return longer if over <= 1e-9 * load.total * trade.kept else inf


def _through_rank(schedule: Schedule, rates: Rates, m: int, p: int, load: Load, longer: float) -> float:
    """From the first pass to the last, by way of a rank whose passes take as much longer."""
    sums, send = rates.sums, rates.send
    if longer == inf:
        return inf
    at, (first, last) = load.place, rates.ends
    busy = load.layers * sums.quickest + first * at.first + last * at.last + at.links * send + longer
    whole = sums.forward + sums.backward + 2 * (p - 1) * send + longer
    if schedule == "gpipe":
        return whole + (m - 1) * busy
    if schedule == "1f1b":
        return whole + (m - p + at.rank) * busy + at.behind * sums.quickest + last * (not at.last)
    if schedule in V_SHAPED:
        return m * busy + at.before * sums.quickest_forward
    return m * busy + at.before * sums.quickest + first * (not at.first)


def least_mixed(place: Place, share: Share, rates: Rates, c: Candidate, mild: int, demand: Demand) -> float:
    """Of a candidate on alike devices some of whose layers are recomputed in a milder way: by way of one of the ranks that have
    to recompute the most. What collectives take that passes do not hide is no less than where these are longest."""
    if place.idle_share < 1.0:
        return 0.0
    costs = [f + b for count, f, b, _ in place.runs(c._replace(recompute=mild)) for _ in range(count)]
    passes, m, layers = 0.0, place.micro_batches(c.micro_batch), place.bench.setting.chain.count
    _, ahead, behind, taken = share.overhead
    for line, load in (each for ranks in demand.loaded for each in ranks):
        busy = sum(costs[stage] for stage in c.cut.placed[load.place.rank]) + taken * (ahead + behind)
        longer = _longer(rates, share, demand, line, load, layers)
        passes = max(passes, sum(costs[: load.place.rank]) + m * (busy + longer))
    dear = place.times(c, pipeline_bound)
    return ROUNDED * (passes + dear.total - dear.pipeline)


def least_with(place: Place, share: Share, micro_batch: int, passes: float) -> float:
    """Of a step whose way through the pipeline is known."""
    passes = share.overhead.beside(passes, place.micro_batches(micro_batch), 0.0, 0.0)
    return ROUNDED * (passes + share.overhead.once + place.sync_seconds)


def least_busy(place: Place, of: int) -> float:
    """Seconds that the mean rank's passes take in a step, with any micro-batch up to `of`."""
    sums = place.sums(of, 0)
    return _WHOLE * place.rows / of * (sums.forward + sums.backward) / place.pipeline


class LeastStep(NamedTuple):
    """Seconds of a step; bytes by which it exceeds what it may use."""

    seconds: float
    over: float


def least_at(
    place: Place,
    shares: Iterable[Share],
    rates: Rates,
    micro_batch: int,
    courses: tuple[Course, ...],
    ever: tuple[Course, ...] = (),
    of: int = 0,
    balanced: bool = False,
) -> list[LeastStep]:
    """By way of ZeRO, under any of some schedules; with this micro-batch, or under `ever` with this or a larger one. `of`: the
    micro-batch that the rates are of, if they are a larger one's; `balanced`: as `demand_of` has it. Of larger micro-batches
    ranks hold as many sequences at least, and wait longer for each other; they may do without sums of gradients."""
    m, p, trade = place.micro_batches(micro_batch), place.pipeline, rates.trade
    part, sums, layers = _WHOLE * micro_batch / (of or micro_batch), rates.sums, place.bench.setting.chain.count
    demand, every = demand_of(place, rates.held.scaled(part), m, courses, ever, balanced), ever or courses
    each = (least_pipeline(schedule, sums, rates.send, m, p, v, 0, place.idle_share) for schedule, v in _quickest(every))
    passes, waits = min(each), place.idle_share == 1.0
    each_way = sums.quickest_forward if courses[0][0] in V_SHAPED else sums.quickest
    busy = m * -(-layers // p) * sums.quickest if waits else 0.0
    if not place.alike:
        work, paces = place.paces(of or micro_batch, 0)
        busy = max(busy, m * work / sum(paces))
    found, around = list[LeastStep](), len(demand.lines) - len(demand.inside)
    for overhead, states in shares:
        may_keep, seconds = demand.may_keep(states), inf
        over = demand.over(may_keep, states, part * trade.least)
        if over <= 0:
            longer = trade.seconds(trade.kept - min(may_keep[:around]) / part)
            seconds = max(passes + m / p * longer, busy)
            for rank, most in zip(demand.inside, may_keep[around:], strict=True) if waits else ():
                more = 0.0 if ever else trade.seconds(trade.kept - most / part) * rank.even / layers
                seconds = max(seconds, m * (rank.layers * sums.quickest + more) + rank.before * each_way)
            seconds *= part
            if not ever:
                seconds = overhead.beside(seconds, m, part * sums.forward / p, part * (sums.backward + longer) / p)
            seconds = _WHOLE * (seconds + overhead.once + place.sync_seconds)
        found.append(LeastStep(seconds, over))
    return found


@cache
def _quickest(courses: tuple[Course, ...]) -> tuple[Course, ...]:
    """Of each schedule the one with the fewest virtual stages."""
    return tuple(dict(sorted(courses, key=itemgetter(1), reverse=True)).items())
