"""What no plan holds less than: bytes of some rank, told before layers are cut into stages, or once it is known how.

Every bound is a line: so many bytes whatever is chosen, and multiples of the state, and of what layers keep for one
micro-batch. So it says how much these may keep, given the state.

    mean       of even shares: of state, of one micro-batch's activations and of the loss
    schedule   of ranks that hold c micro-batches, however layers lie on them (`schedule.least_in_flight`)
    load       of one rank whose layers are known (loads.py)
    interior   of the second rank and the last but one, where layers are alike and balanced (`loads.interior_of`)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mlmdsl.planner.holdings import Sharing
from mlmdsl.planner.loads import Interior, Load, interior_of, loads_of
from mlmdsl.planner.moments import Moment, reduces_each_pass
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.schedule import Course, all_full, least_of, sums_while_full
from mlmdsl.planner.stages import Part

Cuts = tuple[tuple[int, ...], ...]  # ways in which layers may be cut into virtual stages; none where it is not known


class States(NamedTuple):
    """Bytes of state at least, without and with sums of gradients: of all pipeline ranks together when the first backward pass
    begins, and in a later one; of each layer. FSDP2's buffers aside. `makes`: whether a backward pass makes the gradients of a
    layer before it adds them to their sums."""

    whole: tuple[float, float]
    makes: tuple[bool, bool]
    layer: tuple[float, float]


def states_of(place: Place, zero: int, replicate: int) -> States:
    """Of layers where they are of one kind, in a pipeline."""
    sharing, piped = place.sharing(zero, replicate, 1), place.pipeline > 1
    in_place = place.bench.setting.width == 4 and not reduces_each_pass(sharing.zero, piped)
    whole = [state_bytes(place, place.bench.setting.chain.whole[0], sharing, summed) for summed in (False, True)]
    layer = (0.0, 0.0)
    if piped and len(place.bench.setting.chain.kinds) == 1:
        layer = layer_bytes(place, sharing, False), layer_bytes(place, sharing, True)
    return States((whole[0], whole[1]), (sharing.zero > 0, sharing.zero > 0 and not in_place), layer)


def layer_bytes(place: Place, sharing: Sharing, summed: bool) -> float:
    """State of one layer more in a stage of a pipeline, as `state_bytes` has it: what layers have in common and what is
    gathered of one or two at a time aside."""
    holdings, width, one = place.bench.holdings, place.bench.setting.width, place.bench.setting.chain.part((1,), False, False)
    experts, whole = holdings.of(one).experts, holdings.units(one, 1).layers[0][1]
    if not sharing.zero:
        return (width + 4 * (width < 4) + 12) * (whole + experts)
    own, waits = holdings.units(one, sharing.shards).layers[0][1] / sharing.shards, _waits(sharing, summed)
    found = 12 * own + width * whole * (sharing.zero < 3 or waits) + 4 * whole * waits
    return found + sum(holdings.shared((one,), sharing, width, "loss")) if experts else found


def _waits(sharing: Sharing, summed: bool) -> bool:
    """Whether sums of gradients are there, which wait for a reduction."""
    return summed and sharing.piped and sharing.zero > 0 and not reduces_each_pass(sharing.zero, sharing.piped)


def state_bytes(place: Place, part: Part, sharing: Sharing, summed: bool) -> float:
    """Of a rank with this part, when its first backward pass begins, or (`summed`) a later one, if sums wait till then for a
    reduction."""
    state = place.bench.state((part,), sharing, Moment("loss", (1,), (0,) if _waits(sharing, summed) else ()))
    return float(sum(state) - state.buffers)


class Line(NamedTuple):
    """Of a rank, bytes of one micro-batch that all layers may keep together if it had no state, where gradients are added one
    by one and where a layer's are made first; by how much less for each byte of the whole state, and of a layer's; bytes that
    the rank holds for each of them."""

    most: tuple[float, float]
    whole: float
    layer: float
    held: float

    def may_keep(self, states: States, summed: bool) -> float:
        return self.most[states.makes[summed]] - self.whole * states.whole[summed] - self.layer * states.layer[summed]


class Demand(NamedTuple):
    """Of a micro-batch under one schedule: lines of the mean rank and of the fullest, however layers are cut, and of ranks
    `inside` that are known where layers are balanced; for each way to cut them, lines of ranks with their loads; whether sums
    of gradients are there by then."""

    lines: tuple[Line, ...]
    inside: tuple[Interior, ...]
    loaded: tuple[tuple[tuple[Line, Load], ...], ...]
    summed: bool

    def may_keep(self, states: States) -> list[float]:
        """By line, bytes of one micro-batch that all layers may keep together; for the sake of a rank inside, if all kept as
        much as its own do."""
        makes, whole, layer = states.makes[self.summed], states.whole[self.summed], states.layer[self.summed]
        return [most[makes] - of_whole * whole - of_layer * layer for most, of_whole, of_layer, _ in self.lines]

    def over(self, may_keep: Sequence[float], states: States, kept: float) -> float:
        """Bytes by which a plan exceeds what it may use, at least, where all layers keep so many for a micro-batch."""
        found = max([line.held * (kept - most) for line, most in zip(self.lines, may_keep, strict=True)])
        if self.loaded:
            summed = self.summed
            cuts = [max([line.held * (kept - line.may_keep(states, summed)) for line, _ in ranks]) for ranks in self.loaded]
            found = max(found, min(cuts))
        return found


class LeastHeld(NamedTuple):
    """What all lines of a micro-batch are made of: the loss; what layers need while the backward pass of one runs, gradients
    being added one by one, or a layer's made first; the receive buffers between two stages in one direction."""

    loss: float
    working: tuple[float, float]
    buffers: float

    def scaled(self, factor: float) -> LeastHeld:
        """Of a smaller micro-batch; the receive buffers are those of as many sequences."""
        adding, making = self.working
        return LeastHeld(self.loss * factor, (adding * factor, making * factor), self.buffers)


def held_of(place: Place, micro_batch: int, modes: Iterable[int], apart: bool) -> LeastHeld:
    """Under the least of some ways of recomputing; `apart`: where gradients of weights may be put off."""
    least = place.bench.least_activations(micro_batch)
    working = min(least.working[mode] for mode in modes)
    adding, making = (0, 0) if apart else (least.adding, least.making)
    return LeastHeld(least.loss, (working + adding, working + making), place.least_buffers(micro_batch))


def demand_of(
    place: Place,
    held: LeastHeld,
    micro_batches: int,
    courses: tuple[Course, ...],
    ever: tuple[Course, ...] = (),
    balanced: bool = False,
) -> Demand:
    """Of the schedule that holds least among some, for each of the quantities, however layers lie on the ranks; or under `ever`
    of any larger micro-batch, too. `balanced`: whether layers are alike, and cut so that the slowest stage is as fast as can
    be."""
    pipeline, layers = place.pipeline, place.bench.setting.chain.count
    summed, (kept, state, received, buffers) = least_of(courses, pipeline, micro_batches)
    inside = interior_of(all_full(ever or courses, pipeline, micro_batches), pipeline, layers) if balanced else ()
    lines = [_line(place, held, rank.links, 0.0, rank.layers, rank.total / layers) for rank in inside]
    most = _line(place, held, received, state, 0.0, kept)
    return Demand((_mean(place, held, buffers), most, *lines), inside, (), summed and not ever)


def loaded_demand(place: Place, held: LeastHeld, micro_batches: int, course: Course, cuts: Cuts) -> Demand:
    """Of one schedule, layers being cut into stages in one of these ways."""
    (schedule, interleave), pipeline, layers = course, place.pipeline, place.bench.setting.chain.count
    loads = [loads_of(course, pipeline, micro_batches, stages) for stages in cuts]
    each = (((_line(place, held, x.place.links, 0.0, x.layers, x.total / layers), x) for x in ranks) for ranks in loads)
    mean = _mean(place, held, 2 * (pipeline * interleave - 1) / pipeline)
    return Demand((mean,), (), tuple(map(tuple, each)), sums_while_full(schedule, pipeline, micro_batches))


def _mean(place: Place, held: LeastHeld, links: float) -> Line:
    """Of the mean rank, for one of the micro-batches that it holds."""
    share = 1 / place.pipeline
    return _line(place, held, links, share, 0.0, share, held.loss * share)


def _line(place: Place, held: LeastHeld, links: float, whole: float, layer: float, kept: float, loss: float = 0.0) -> Line:
    """`whole`, `layer`, `kept`: bytes of a rank for each of the whole state, of a layer's, and of what all layers keep. Bytes
    of activations are whole numbers."""
    slack, (adding, making) = place.slack, held.working
    room, kept = place.most_bytes - place.context_bytes + 1 - slack * links * held.buffers, slack * kept
    most = (room - slack * max(loss, adding)) / kept, (room - slack * max(loss, making)) / kept
    return Line(most, whole / kept, layer / kept, kept)
