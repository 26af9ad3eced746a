"""What no schedule takes less than where ranks of a pipeline differ in pace, however its layers are laid on them.

Let rank s be busy with a micro-batch for c_s seconds, sends included. A way through the schedule is a chain of passes that wait
for each other, so its seconds are a sum of some of these, and no schedule is shorter than any of its ways, nor than a mean of
them:

    any      m c_s and the way to s, down over one stage of each rank before it and up again (of a V, down)
    gpipe    W + (m - 1) c_s, for W seconds of a micro-batch through all ranks
    1f1b     W + (m - p + s) c_s + c_(s+1) + .. + c_(p-1)

Ranks that are busy for c_s seconds do sum(c_s pace_s) of a micro-batch's work at the most (`Paces`). So where a mean of ways
has each c_s k pace_s times at least, it is k times the work at least: of a linear program's dual, some feasible weights.
Besides, layers are whole, and every stage has one (`least_whole`).
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace
from itertools import accumulate
from math import inf
from typing import NamedTuple

from mlmdsl.planner.plan import Schedule
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.proportion import Paces, Speed
from mlmdsl.planner.schedule import V_SHAPED, Course

_EPS = 1e-9  # relative: sums of equal numbers in another order


class Room(NamedTuple):
    """Layers that a rank has room for; where some are recomputed in a dearer way, those that have room as they are, and what
    each one more costs the rank in seconds at least."""

    most: int
    free: float = inf
    dearer: float = 0.0


class Duty(NamedTuple):
    """Seconds that a rank is busy with a micro-batch: with the model's beginning and end, and with a layer."""

    ends: float
    layer: float
    most: int
    free: float
    dearer: float

    def seconds(self, layers: int) -> float:
        more = layers - self.free
        return self.ends + layers * self.layer + (more * self.dearer if more > 0 else 0.0)

    def layers(self, seconds: float) -> int:
        """That it is done with by then."""
        layers = (seconds - self.ends) / self.layer
        if layers > self.free:
            layers = self.free + (layers - self.free) * self.layer / (self.layer + self.dearer)
        return int(layers)


class Way(NamedTuple):
    """Of a micro-batch from rank to rank: seconds of one hand-over, and by rank of the least that a stage takes there."""

    send: float
    stages: tuple[float, ...]

    def sends(self, schedule: Schedule, interleave: int) -> list[float]:
        """Seconds of a rank's own in a forward and a backward pass through all of its stages: the first stage has nothing to
        hand back, and the last one nothing to hand on; where a V turns, nor have the two stages there."""
        last, whole = len(self.stages) - 1, 2 * interleave
        ends = 2 if schedule in V_SHAPED else 1
        return [self.send * (whole - ends * (s == 0) - ends * (s == last)) for s in range(last + 1)]

    def before(self, schedule: Schedule) -> list[float]:
        """By rank, what a micro-batch takes at least until it is there, and back; in a V until it is there."""
        if schedule in V_SHAPED:
            return [0.0, *accumulate(stage + self.send for stage in self.stages[:-1])]
        return [0.0, *accumulate(stage + self.send * (1 + (s > 0)) for s, stage in enumerate(self.stages[:-1]))]


def least_passes(place: Place, micro_batch: int, course: Course, mode: int) -> float:
    """Seconds of all micro-batches through the pipeline, ZeRO left aside, where layers are laid by the ranks' speed or as their
    memory allows (refitting.py)."""
    (schedule, interleave), m, chain = course, place.micro_batches(micro_batch), place.bench.setting.chain
    paces, speeds = place.paces(micro_batch, mode), _speeds(place, micro_batch, mode)
    way = Way(place.least_send(micro_batch), _layers(place, micro_batch, mode, schedule))
    least = least_at_pace(schedule, way, m, interleave, paces)
    if len(chain.kinds) == 1:
        duties = _duties(speeds, schedule, [Room(chain.count)] * place.pipeline)
        least = max(least, least_whole(schedule, way, m, interleave, duties, chain.count))
        if schedule == "interleaved_1f1b":
            least = max(least, least_even(way, m, interleave, paces, speeds))
    return least


def least_with_room(place: Place, micro_batch: int, course: Course, mode: int, rooms: Sequence[Room]) -> float:
    """The same by what ranks have room for, of layers of one kind. What a rank has at least is spread evenly over its stages,
    of which the first has the fewest; the model's first stage may have a layer less."""
    (schedule, interleave), layers = course, place.bench.setting.chain.count
    spare = sum(room.most for room in rooms) - layers
    evenly = [max(1, (room.most - spare) // interleave - (interleave > 1 and not s)) for s, room in enumerate(rooms)]
    if schedule in V_SHAPED:
        evenly[0] = 1
    each = zip(evenly, _layers(place, micro_batch, mode, schedule), strict=True)
    way = Way(place.least_send(micro_batch), tuple(n * seconds for n, seconds in each))
    duties = _duties(_speeds(place, micro_batch, mode), schedule, rooms)
    return least_whole(schedule, way, place.micro_batches(micro_batch), interleave, duties, layers)


def _speeds(place: Place, micro_batch: int, mode: int) -> list[Speed]:
    """By rank."""
    return [bench.speed(micro_batch, mode) for bench in place.benches]


def _layers(place: Place, micro_batch: int, mode: int, schedule: Schedule) -> tuple[float, ...]:
    """By rank, of the quickest layer: both passes, in a V the forward pass."""
    each = (bench.sums(micro_batch, mode) for bench in place.benches)
    return tuple(sums.quickest_forward if schedule in V_SHAPED else sums.quickest for sums in each)


def _duties(speeds: Sequence[Speed], schedule: Schedule, rooms: Sequence[Room]) -> list[Duty]:
    """By rank; the model's end lies where the schedule has the last stage."""
    head = 0 if schedule in V_SHAPED else len(speeds) - 1
    ends = (speed.first * (s == 0) + speed.last * (s == head) for s, speed in enumerate(speeds))
    return [Duty(end, speed.layers[0], *room) for end, speed, room in zip(ends, speeds, rooms, strict=True)]


def least_at_pace(schedule: Schedule, way: Way, micro_batches: int, interleave: int, paces: Paces) -> float:
    """Seconds of all micro-batches. `way`: of forward and backward passes, in a V of forward passes."""
    m, total = micro_batches, sum(paces.ranks)
    sends, before = way.sends(schedule, interleave), way.before(schedule)
    each = sum(pace * (m * own + ahead) for pace, own, ahead in zip(paces.ranks, sends, before, strict=True))
    mean = (m * paces.work + each) / total
    if schedule == "1f1b":
        return max(mean, _least_1f1b(way, m, paces))
    if schedule == "gpipe":
        each = sum(own * (1 + (m - 1) * pace / total) for pace, own in zip(paces.ranks, sends, strict=True))
        return max(mean, paces.work * (1 / max(paces.ranks) + (m - 1) / total) + each)
    return mean


def least_even(way: Way, micro_batches: int, interleave: int, paces: Paces, speeds: Sequence[Speed]) -> float:
    """Of an interleaved schedule whose ranks' stages are as even as whole layers are: none falls short of the mean of its
    rank's stages by more than a layer, and what stands before the first. So the way to a rank is a share of what those before
    it are busy for."""
    m, v, behind, weights = micro_batches, interleave, 0.0, list[float]()
    for pace in reversed(paces.ranks):
        weights.append(max(0.0, pace - behind / v) / m)
        behind += weights[-1]
    weights.reverse()
    short = [speed.layers[0] + speed.first * (s == 0) for s, speed in enumerate(speeds)]
    before = Way(way.send, tuple(-seconds for seconds in short)).before("interleaved_1f1b")
    sends = way.sends("interleaved_1f1b", v)
    each = sum(weight * (m * own + ahead) for weight, own, ahead in zip(weights, sends, before, strict=True))
    return (paces.work + each) / behind


def _least_1f1b(way: Way, micro_batches: int, paces: Paces) -> float:
    """Weighs the ways over single ranks: `own` by the first one (m c_0), which has none of the others' where m = p. Weights are
    such that each c_s has k pace_s; where some would be negative they are none, and k is what the least one has."""
    m, p = micro_batches, len(paces.ranks)
    used = [m > p or s > 0 for s in range(p)]
    weights, own = _weights(m, paces.ranks, used)
    while min(weights) < 0:
        used = [weight > 0 for weight in weights]
        weights, own = _weights(m, paces.ranks, used)
    whole, before, sends = sum(weights), 0.0, way.sends("1f1b", 1)
    if not whole:
        return 0.0
    seconds, least = 0.0, [0.0] * p
    for s, weight in enumerate(weights):
        least[s] = whole + weight * (m - p + s) + before + m * own * (s == 0)
        seconds += least[s] * sends[s]
        before += weight
    work = paces.work * min(has / pace for has, pace in zip(least, paces.ranks, strict=True))
    return (work + seconds) / (whole + own)


def _weights(m: int, paces: Sequence[float], used: Sequence[bool]) -> tuple[list[float], float]:
    """For k = 1: of each way over a rank, and of the first rank's own time if that rank's way is not used. A weight depends on
    those before it, and on their sum: x_s + y_s sum."""
    p, xs, ys = len(paces), list[float](), list[float]()
    x = y = 0.0
    for s, pace in enumerate(paces):
        share = 1 / (m - p + s) if used[s] else 0.0
        xs.append((pace - x) * share)
        ys.append((-1 - y) * share)
        x, y = x + xs[-1], y + ys[-1]
    whole = x / (1 - y)
    return [a + b * whole for a, b in zip(xs, ys, strict=True)], max(0.0, paces[0] - whole) / m * (not used[0])


def least_whole(
    schedule: Schedule, way: Way, micro_batches: int, interleave: int, duties: Sequence[Duty], layers: int
) -> float:
    """Of layers that cost alike: the next one goes to the rank that is the soonest done with it, from one for each stage on.
    Infinite where there is no room for all."""
    m, spare = micro_batches, sum(duty.most for duty in duties) - layers
    if min(duty.most for duty in duties) < interleave or spare < 0:
        return inf
    sends, before = way.sends(schedule, interleave), way.before(schedule)
    around = [own + ahead / m for own, ahead in zip(sends, before, strict=True)]
    counts = _at_once(duties, around, interleave, layers)
    latest = max(begin + duty.seconds(n) for begin, duty, n in zip(around, duties, counts, strict=True))
    following = zip(around, duties, counts, strict=True)
    waiting = [(begin + duty.seconds(n + 1), s) for s, (begin, duty, n) in enumerate(following) if n < duty.most]
    heapify(waiting)
    for _ in range(layers - sum(counts)):
        seconds, s = waiting[0]
        latest = max(latest, seconds)
        counts[s] += 1
        if counts[s] < duties[s].most:
            heapreplace(waiting, (around[s] + duties[s].seconds(counts[s] + 1), s))
        else:
            heappop(waiting)
    return m * latest


def _at_once(duties: Sequence[Duty], around: Sequence[float], interleave: int, layers: int) -> list[int]:
    """What all ranks are given before the first of them is given more than it could do by the time at which all would be done
    if layers could be divided."""
    paces = [1 / duty.layer for duty in duties]
    begun = sum((begin + duty.ends) * pace for begin, duty, pace in zip(around, duties, paces, strict=True))
    done = (layers + begun) / sum(paces) * (1 - _EPS)
    each = zip(around, duties, strict=True)
    return [min(max(duty.layers(done - begin), interleave), duty.most) for begin, duty in each]
