"""When a rank's memory may be fullest in the course of a step: what it holds then of passes, sums and gathered weights.

    gather      of the last layer's weights in a forward pass, those of the layer before lying in their buffer still
    loss        of one micro-batch, until the backward pass of the model's head
    backward    the first layer of a backward pass, all activations being there
    layer       where each layer's gradients are reduced as soon as they are there: of the first one
    next        the second layer's backward pass, while those are still being sent
    reduction   of a stage's gradients, after its last backward pass
    step        sums of experts that are shared out, then the optimizer: no other sums are there any more

A stage's sums of gradients are there from the end of its first backward pass until they are reduced, which follows its last.
So a schedule has few combinations that no other exceeds: the most micro-batches with the sums that are there by then, the most
sums with the micro-batches that are left, and the reductions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cache
from operator import le
from typing import Literal, NamedTuple

from mlmdsl.planner import zero_bubble
from mlmdsl.planner.plan import Schedule
from mlmdsl.planner.schedule import V_SHAPED, in_flight, interleaved, rounds

Turn = Literal["gather", "loss", "backward", "layer", "next", "reduction", "step"]
Counts = tuple[int, ...]


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
    each_pass = reduces_each_pass(zero, pipeline > 1)
    several = () if pipeline > 1 or micro_batches == 1 or zero != 1 else (0,)
    fullest = _fullest(*mesh)
    if not zero or each_pass or pipeline == 1:
        fullest = _without_sums(fullest, several)
    makes = [m._replace(makes=zero > 0 and (each_pass or not (m.summed and in_place)) and not m.apart) for m in fullest]
    found = [m._replace(turn=turn) for m in makes for turn in (turns if m.turn == "backward" else (m.turn,))]
    if zero and (each_pass or pipeline == 1):
        layerwise: tuple[Turn, ...] = ("layer", "next")
        if pipeline == 1 and (zero == 3 or micro_batches == 1):
            layerwise = ("gather", "layer", "next")
        found += [m._replace(turn=turn) for m in makes for turn in layerwise]
        found.append(Moment("reduction", (0,) * interleave, several))
    return (*found, Moment("step", (0,) * interleave)) if zero and experts else tuple(found)


def _without_sums(fullest: list[Moment], several: Counts) -> list[Moment]:
    """What is left of them where no sums wait for a reduction, or all the time."""
    plain = [m._replace(summed=several, reduced=(), reducing=-1, fresh=()) for m in fullest if m.turn != "reduction"]
    return _largest(dict.fromkeys(plain))


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
        extremes = interleaved(pipeline, interleave, micro_batches, rank)
        return list(_steady(held, extremes, micro_batches // rounds(pipeline, micro_batches)))
    return list(_stage_by_stage(held, micro_batches))


def _steady(held: Counts, extremes: Collection[Counts], each: int) -> Iterator[Moment]:
    """Of an interleaved schedule with several rounds: all stages have sums when the second begins. In the last one a stage is
    reduced while those before it hold a round's micro-batches. `extremes`: when the first stage holds the most, and the last:
    of two stages, which hold as many together all the time, no other moment exceeds both."""
    stages = tuple(range(len(held)))
    last = stages[-1]
    if last > 1:
        yield Moment("backward", held, stages)
    for counts in extremes:
        if counts != held or last == 1:
            yield Moment("backward", counts, stages, settled=True)
    yield Moment("reduction", (each,) * last + (0,), stages, reducing=last)
    yield Moment("reduction", (0,) * len(held), (0,), stages[1:], reducing=0)


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
    """Pass by pass, of the rank's two stages. The first stage, which has no gradient of an input, puts none off. FSDP2 adds the
    gradients of a pass to the sums when the next one comes by."""
    held, waiting, left = [0, 0], [0, 0], [micro_batches, micro_batches]
    summed, fresh = [False, False], [False, False]
    found: dict[tuple[_Flags, Counts], int] = {}  # and past
    most: dict[_Flags, Counts] = {}  # the last that exceeded those before it

    def note(turn: Turn, *, reducing: int = -1, apart: bool = False, past: int = 0) -> None:
        through, sums, new = (not left[0], not left[1]), (summed[0], summed[1]), (fresh[0], fresh[1])
        flags = (turn, reducing, apart, through, sums, new)
        counts = (*held, *waiting, held[1] - past)
        if flags not in most or not all(map(le, counts, most[flags])):
            found[flags, counts] = past
            most[flags] = counts

    for kind, stage, _ in zero_bubble.order(schedule, pipeline, micro_batches, rank):
        mine, last = int(stage >= pipeline), stage == 2 * pipeline - 1
        apart, past = stage > 0 and kind in "IW", waiting[1]
        held[mine] += kind == "F"
        if kind == "B" or (kind == "I" and apart) or (kind == "W" and not apart):
            if last:
                note("loss", apart=apart, past=past)
            note("backward", apart=apart, past=past)
            summed[mine] |= fresh[mine]
            fresh[mine] = False
            waiting[mine] += apart
            note("backward", apart=apart, past=past)
        if kind in "WB":
            held[mine] -= 1
            waiting[mine] -= apart
            left[mine] -= 1
            fresh[mine] = True
            if not left[mine]:
                note("reduction", reducing=mine, past=waiting[1])
    return _largest([_on_two_stages(*moment, past) for moment, past in found.items()])


# Whose gradients are being reduced; of both stages whether they are through, have sums, and gradients to add to them
_Two = tuple[bool, bool]
_Flags = tuple[Turn, int, bool, _Two, _Two, _Two]


def _on_two_stages(flags: _Flags, counts: Counts, past: int) -> Moment:
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
        past,
        settled=True,
    )


def _largest(found: Collection[Moment]) -> list[Moment]:
    """Those of which no other has all, and more, in their order."""
    groups: dict[tuple[object, ...], list[tuple[Counts, Moment]]] = {}
    for moment in found:
        groups.setdefault((moment.turn, moment.reducing, moment.reduced, moment.apart), []).append((_amounts(moment), moment))
    kept: set[Moment] = set()
    for group in groups.values():
        largest: list[Counts] = []
        for amounts, moment in sorted(group, key=lambda each: sum(each[0]), reverse=True):  # what exceeds another comes first
            if not any(all(map(le, amounts, other)) for other in largest):
                largest.append(amounts)
                kept.add(moment)
    return [moment for moment in found if moment in kept]


def _amounts(moment: Moment) -> Counts:
    """All that a moment's memory grows with."""
    sums = (stage in of for of in (moment.summed, moment.fresh) for stage in range(len(moment.held)))
    return (*moment.held, *moment.waiting, moment.held[-1] - moment.past, *sums)
