"""When a rank's memory may be fullest in the course of a step: what it holds then of passes, sums and gathered weights.

    gather      of the last layer's weights in a forward pass, those of the layer before lying in their buffer still
    loss        of one micro-batch, until the backward pass of the model's head
    backward    the first layer of a backward pass, all activations being there
    layer       where each layer's gradients are reduced as soon as they are there: of the first one
    next        the second layer's backward pass, while those are still being sent
    reduction   of a stage's gradients, after its last backward pass; of those around the layers, where each pass reduces
    step        sums of experts that are shared out, then the optimizer: no other sums are there any more

A stage's sums of gradients are there from the end of its first backward pass until they are reduced, which follows its last
(or, where every pass reduces, to the step, a share of them).
So a schedule has few combinations that no other exceeds: the most micro-batches with the sums that are there by then, the most
sums with the micro-batches that are left, and the reductions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from operator import le
from typing import Literal, NamedTuple, TypeVar

from mlmdsl.planner import zero_bubble
from mlmdsl.planner.plan import Schedule
from mlmdsl.planner.schedule import V_SHAPED, extremes, in_flight, rounds

Turn = Literal["gather", "loss", "backward", "layer", "next", "reduction", "step"]
Counts = tuple[int, ...]
_T = TypeVar("_T")
# Of passes in a V that recur: after so many, flags recur as well; and so many before the end, none becomes another
_FIRST, _LAST = 3, 2


class Moment(NamedTuple):
    """Micro-batches held of each of the rank's virtual stages, in model order; which stages have sums of gradients, which have
    theirs reduced; `reducing`: whose are being reduced. `waiting`: micro-batches whose gradients of weights are put off;
    `fresh`: stages whose last ones are there and not yet added up; `apart`: the backward pass makes none, and frees nothing;
    `past`: of the last stage's micro-batches those whose loss is gone. `makes`: the backward pass makes all gradients of a
    layer before they go anywhere."""

    turn: Turn
    held: Counts
    summed: Counts = ()
    reduced: Counts = ()
    reducing: int = -1
    waiting: Counts = ()
    fresh: Counts = ()
    apart: bool = False
    past: int = 0
    makes: bool = False
    settled: bool = False  # which stage holds how many does not change in the course of the step

    @property
    def of_state(self) -> tuple[Turn, Counts, Counts, int, Counts, bool, bool]:
        """What weights and their gradients depend on."""
        return self.turn, self.summed, self.reduced, self.reducing, self.fresh, self.apart, self.makes


@cache
def moments(
    schedule: Schedule,
    pipeline: int,
    interleave: int,
    micro_batches: int,
    rank: int,
    zero: int,
    *,
    loss: bool,
    in_place: bool,
    experts: bool,
) -> tuple[Moment, ...]:
    """`zero`: 0 where the replicas' weights are whole; `loss`: whether the rank has the model's last stage; `in_place`:
    whether a backward pass adds each gradient to its sum at once, where that is there; `experts`: whether it has some that
    are shared out."""
    mesh = (schedule, pipeline, interleave, micro_batches, rank)
    turns: tuple[Turn, ...] = ("loss", "backward") if loss and schedule not in V_SHAPED else ("backward",)
    piped, each_pass = pipeline > 1, reduces_each_pass(zero, pipeline > 1)
    several = () if piped or micro_batches == 1 or zero != 1 else (0,)
    fullest = _fullest(*mesh)
    if zero and piped and each_pass:
        fullest = _without_reductions(fullest)
    elif not (zero and piped):
        fullest = _without_sums(fullest, several)
    makes = [m._replace(makes=zero > 0 and (each_pass or not (m.summed and in_place)) and not m.apart) for m in fullest]
    found = [m._replace(turn=turn) for m in makes for turn in (turns if m.turn == "backward" else (m.turn,))]
    if zero and piped and each_pass:
        found += _layerwise(makes)
    elif zero and not piped:
        layerwise: tuple[Turn, ...] = ("gather", "layer", "next") if zero == 3 or micro_batches == 1 else ("layer", "next")
        found += [m._replace(turn=turn) for m in makes for turn in layerwise]
        found.append(Moment("reduction", (0,), several))
    return (*found, Moment("step", (0,) * interleave)) if zero and experts else tuple(found)


def _without_sums(fullest: list[Moment], several: Counts) -> list[Moment]:
    """What is left of them where no sums wait for a reduction, or all the time."""
    plain = [m._replace(summed=several, reduced=(), reducing=-1, fresh=()) for m in fullest if m.turn != "reduction"]
    return _largest(plain)


def _without_reductions(fullest: list[Moment]) -> list[Moment]:
    """What is left of them where every backward pass reduces its gradients, whose sums stay."""
    plain = [m._replace(summed=tuple(sorted({*m.summed, *m.reduced})), reduced=()) for m in fullest if m.turn != "reduction"]
    return _largest(dict.fromkeys(plain))


def _layerwise(fullest: list[Moment]) -> list[Moment]:
    """The backward passes of each stage that may have one then: of its last layer and the next, and their end, when it has let
    go of its micro-batch."""
    found: dict[Moment, None] = {}
    for m in fullest:
        for stage in {*m.summed, len(m.held) - 1}:
            if count := m.held[stage]:
                held = (*m.held[:stage], count - 1, *m.held[stage + 1 :])
                passing = m._replace(reducing=stage)
                found |= dict.fromkeys((passing._replace(turn="layer"), passing._replace(turn="next")))
                found[passing._replace(turn="reduction", held=held)] = None
    return _largest(found)


def reduces_each_pass(zero: int, piped: bool) -> bool:
    """Whether gradients are reduce-scattered after every backward pass, and not once a step: torch's pipeline stages would do
    neither, and are told to for ZeRO 2 (runtime/pipeline.py)."""
    return zero == 2 or (zero == 3 and not piped)


def _fullest(schedule: Schedule, pipeline: int, interleave: int, micro_batches: int, rank: int) -> list[Moment]:
    if schedule in V_SHAPED:
        return _in_a_v(schedule, pipeline, min(micro_batches, 2 * pipeline + 2), rank)  # after these one is as the next
    held = in_flight(schedule, pipeline, interleave, micro_batches, rank)
    if interleave == 1:
        (most,) = held
        found = [Moment("backward", held, (0,) if micro_batches > most else ())]
        if micro_batches == most > 1:  # all forward passes come first
            found.append(Moment("backward", (most - 1,), (0,)))
        return [*found, Moment("reduction", (0,), (0,), reducing=0)]
    if rounds(pipeline, micro_batches) > 1:
        most = extremes(pipeline, interleave, micro_batches, rank)
        return list(_steady(held, most, micro_batches // rounds(pipeline, micro_batches)))
    return list(_stage_by_stage(held, micro_batches))


def _steady(held: Counts, most: Collection[Counts], each: int) -> Iterator[Moment]:
    """Of an interleaved schedule with several rounds: all stages have sums when the second begins. In the last one a stage is
    reduced while those before it hold a round's micro-batches. `most`: when the first stage holds the most, and the last:
    of two stages, which hold as many together all the time, no other moment exceeds both."""
    stages = tuple(range(len(held)))
    last = stages[-1]
    if last > 1:
        yield Moment("backward", held, stages)
    for counts in most:
        if counts != held or last == 1:
            yield Moment("backward", counts, stages, settled=True)
    yield Moment("reduction", (each,) * last + (0,), stages, reducing=last, settled=True)
    yield Moment("reduction", (0,) * len(held), (0,), stages[1:], reducing=0, settled=True)


def _stage_by_stage(held: Counts, micro_batches: int) -> Iterator[Moment]:
    """Of one round: one stage's backward passes after another's, which are reduced by then."""
    last, whole = len(held) - 1, sum(held) == micro_batches * len(held)
    yield Moment("backward", held, () if whole else (last,), settled=True)
    for stage in (last, 0):
        before = (micro_batches,) * stage
        left = held[last] - whole if stage else micro_batches - 1
        reduced = tuple(range(stage + 1, last + 1))
        yield Moment("backward", (*before, left, *(0 for _ in reduced)), (stage,), reduced, settled=True)
        yield Moment("reduction", (*before, 0, *(0 for _ in reduced)), (stage,), reduced, stage, settled=True)


@cache
def _in_a_v(schedule: Schedule, pipeline: int, micro_batches: int, rank: int) -> list[Moment]:
    """Pass by pass, of the rank's two stages."""
    course = _Course(micro_batches, rank == 0)
    for times, unit in zero_bubble.script(schedule, pipeline, micro_batches, rank):
        course.repeat(unit, times)
    return [_on_two_stages(*moment) for moment in _undominated({moment: _amounts_of(*moment) for moment in course.found})]


class _Course:
    """What a rank of a V holds in the course of its passes. The first stage, which has no gradient of an input, puts none off.
    FSDP2 adds the gradients of a whole backward pass to the sums layer by layer, those that were put off when the next pass
    comes by."""

    def __init__(self, micro_batches: int, ends: bool) -> None:
        self.ends = ends  # whether the rank has the model's first and its last stage
        self.held, self.waiting, self.left = [0, 0], [0, 0], [micro_batches, micro_batches]
        self.summed, self.fresh = [False, False], [False, False]
        self.found: list[tuple[_Flags, Counts]] = []
        self.most: dict[_Flags, Counts] = {}  # the last that exceeded those before it

    def repeat(self, unit: zero_bubble.Unit, times: int) -> None:
        """Where all counts fall each time, or none does, the first times and the last ones are enough."""
        done = min(times, _FIRST - 1)
        for _ in range(done):
            self.run(unit)
        if times > _FIRST + _LAST:
            before = self.state()
            self.run(unit)
            done = times - _LAST if self.leaps(before, times - _FIRST - _LAST) else _FIRST
        for _ in range(times - done):
            self.run(unit)

    def state(self) -> tuple[Counts, Counts, tuple[bool, ...]]:
        return (*self.held, *self.waiting), (*self.left,), (*self.summed, *self.fresh)

    def leaps(self, before: tuple[Counts, Counts, tuple[bool, ...]], times: int) -> bool:
        """As often as said what has been done since, if that makes no more of a moment."""
        counts, left, flags = self.state()
        change = [after - was for after, was in zip(counts, before[0], strict=True)]
        past = change[1] - change[3]  # of what the last stage holds, without what is past its loss
        if flags != before[2] or min(*change, past) < 0 < max(*change, past):
            return False
        self.held = [counts[i] + times * change[i] for i in (0, 1)]
        self.waiting = [counts[2 + i] + times * change[2 + i] for i in (0, 1)]
        self.left = [left[i] + times * (left[i] - before[1][i]) for i in (0, 1)]
        return True

    def run(self, unit: zero_bubble.Unit) -> None:
        held, waiting, left, summed, fresh = self.held, self.waiting, self.left, self.summed, self.fresh
        for kind, mine in unit:
            apart, past = (mine == 1 or not self.ends) and kind in "IW", waiting[1]
            held[mine] += kind == "F"
            if kind == "B" or (kind == "I" and apart) or (kind == "W" and not apart):
                if mine and self.ends:
                    self.note("loss", apart=apart, past=past)
                self.note("backward", apart=apart, past=past)
                summed[mine] |= fresh[mine]
                fresh[mine] = False
                waiting[mine] += apart
                self.note("backward", apart=apart, past=past)
            if kind in "WB":
                held[mine] -= 1
                waiting[mine] -= apart
                left[mine] -= 1
                fresh[mine], summed[mine] = apart, summed[mine] or not apart
                if not left[mine]:
                    self.note("reduction", reducing=mine, past=waiting[1])

    def note(self, turn: Turn, *, reducing: int = -1, apart: bool = False, past: int = 0) -> None:
        through = not self.left[0], not self.left[1]
        flags = (turn, reducing, apart, through, (self.summed[0], self.summed[1]), (self.fresh[0], self.fresh[1]))
        counts = (*self.held, *self.waiting, self.held[1] - past)
        if flags not in self.most or not all(map(le, counts, self.most[flags])):
            self.found.append((flags, counts))
            self.most[flags] = counts


# Whose gradients are being reduced; of both stages whether they are through, have sums, and gradients to add to them
_Two = tuple[bool, bool]
_Flags = tuple[Turn, int, bool, _Two, _Two, _Two]


def _on_two_stages(flags: _Flags, counts: Counts) -> Moment:
    turn, reducing, apart, through, summed, fresh = flags
    here = [i for i in (0, 1) if not through[i] or i == reducing]
    return Moment(
        turn,
        counts[:2],
        tuple(i for i in here if summed[i]),
        tuple(i for i in (0, 1) if through[i] and i != reducing),
        reducing,
        counts[2:4],
        tuple(i for i in here if fresh[i]),
        apart,
        counts[1] - counts[4],
        settled=True,
    )


def _amounts_of(flags: _Flags, counts: Counts) -> tuple[tuple[object, ...], Counts]:
    """Of a moment that `_on_two_stages` is to make: what `_amounts` says of it."""
    turn, reducing, apart, through, summed, fresh = flags
    here = [not through[i] or i == reducing for i in (0, 1)]
    sums = (of[i] and here[i] for of in (summed, fresh) for i in (0, 1))
    return (turn, reducing, *here, apart), (*counts, *sums)


def _undominated(found: Mapping[_T, tuple[object, Counts]]) -> list[_T]:
    """Those of which no other of the same kind has all, and more, in their order: (kind, amounts) of each."""
    groups: dict[object, list[tuple[Counts, _T]]] = {}
    for moment, (kind, amounts) in found.items():
        groups.setdefault(kind, []).append((amounts, moment))
    kept: set[_T] = set()
    for group in groups.values():
        largest: list[Counts] = []
        for amounts, moment in sorted(group, key=lambda each: sum(each[0]), reverse=True):  # what exceeds another comes first
            if not any(all(map(le, amounts, other)) for other in largest):
                largest.append(amounts)
                kept.add(moment)
    return [moment for moment in found if moment in kept]


def _largest(found: Iterable[Moment]) -> list[Moment]:
    """Those of which no other has all, and more, in their order."""
    return _undominated(
        {moment: ((moment.turn, moment.reducing, moment.reduced, moment.apart), _amounts(moment)) for moment in found}
    )


def _amounts(moment: Moment) -> Counts:
    """All that a moment's memory grows with."""
    sums = (stage in of for of in (moment.summed, moment.fresh) for stage in range(len(moment.held)))
    return (*moment.held, *moment.waiting, moment.held[-1] - moment.past, *sums)
