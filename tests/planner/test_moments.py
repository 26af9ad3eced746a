"""What ranks hold when they are fullest, against every moment of the schedule's own order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from operator import le

import pytest

from mlmdsl.planner import moments, schedule, zero_bubble
from mlmdsl.planner.moments import Counts, Moment
from mlmdsl.planner.plan import Schedule
from tests.planner.simulation import actions

INTERLEAVED = [
    (p, v, m)
    for p, v in product((2, 3, 4, 5, 8), (2, 3, 4))
    for m in range(2 * p, 7 * p + 1)
    if schedule.executable("interleaved_1f1b", p, m)
]
V_CASES = [
    (name, p, m)
    for name, p in product(schedule.V_SHAPED, (2, 3, 4, 5, 8))
    for m in range(1, 4 * p + 3)
    if schedule.executable(name, p, m)
]


# ---- the interleaved schedule ---------------------------------------------------------------------------------------


def steady(p: int, v: int, m: int, rank: int) -> list[Counts]:
    """What each stage holds before each backward pass that follows a forward pass."""
    held, found = [0] * v, list[Counts]()
    order = actions("interleaved_1f1b", p, v, m, rank)
    for before, action in zip((None, *order), order, strict=False):
        if action.backward and before is not None and not before.backward:
            found.append(tuple(held))
        held[action.stage // p] += -1 if action.backward else 1
    return found


def test_extremes_of_interleaved_stages() -> None:
    """A moment of the schedule each; no other has more of the first stage, or of the last one."""
    for (p, v, m), rank in ((case, rank) for case in INTERLEAVED for rank in range(case[0])):
        every, found = steady(p, v, m, rank), schedule.extremes(p, v, m, rank)
        assert 1 <= len(found) <= 2 and set(found) <= set(every)
        assert found[0][0] == max(counts[0] for counts in every)
        assert found[-1][-1] == max(counts[-1] for counts in every)


def test_few_micro_batches_tell_what_ranks_hold() -> None:
    """Least counts are taken for as few micro-batches as ranks hold as many of."""
    for p, v, m in INTERLEAVED:
        counts = [schedule.extremes(p, v, m, rank) for rank in range(p)]
        few = min(m // p, 3) * (m // (m // p))
        assert counts == [schedule.extremes(p, v, few, rank) for rank in range(p)]
        mean = [sum(schedule.in_flight("interleaved_1f1b", p, v, m, rank)) / v for rank in range(p)]
        most = schedule.least_in_flight("interleaved_1f1b", p, v, m)
        if v > 2:
            assert most.kept == pytest.approx(1 / sum(1 / count for count in mean))
            assert most.state == pytest.approx(most.kept / max(mean))
        else:  # of two stages no more than the mean
            assert most.kept <= 1 / sum(1 / count for count in mean) * (1 + 1e-12)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_v", "dualpipe_v"])
def test_least_counts_are_the_ranks_smallest(name: Schedule) -> None:
    interleave = 1 + (name in schedule.V_SHAPED)
    cases = [(p, m) for p in (2, 3, 5, 8) for m in range(1, 5 * p) if schedule.executable(name, p, m)]
    for p, m in cases:
        counts = [min(schedule.in_flight(name, p, interleave, m, rank)) for rank in range(p)]
        found = schedule.least_in_flight(name, p, interleave, m)
        assert found.kept == pytest.approx(1 / sum(1 / count for count in counts))
        assert found.state == pytest.approx(found.kept / max(counts))


# ---- in a V ---------------------------------------------------------------------------------------------------------


def every_moment(name: Schedule, p: int, m: int, rank: int) -> Iterator[Moment]:
    """Of a rank in a V, before and after each backward pass has made its gradients, and in reductions."""
    held, waiting, left, summed, fresh = [0, 0], [0, 0], [m, m], set[int](), set[int]()
    for kind, stage, _ in zero_bubble.order(name, p, m, rank):
        mine, past = int(stage >= p), waiting[1]
        apart = kind in "IW" and stage > 0

        def moment(turn: moments.Turn, reducing: int = -1, *, apart: bool = apart, past: int = past) -> Moment:
            here = [i for i in (0, 1) if left[i] or i == reducing]
            reduced = tuple(i for i in (0, 1) if i not in here)
            sums, new = (tuple(i for i in here if i in of) for of in (summed, fresh))
            return Moment(turn, (*held,), sums, reduced, reducing, (*waiting,), new, apart, past, settled=True)

        if kind == "F":
            held[mine] += 1
        elif kind == "B" or (kind == "I") == (stage > 0):  # makes gradients of inputs, or those of the first stage
            if stage == 2 * p - 1:
                yield moment("loss")
            yield moment("backward")
            if mine in fresh:
                summed.add(mine)
                fresh.remove(mine)
            waiting[mine] += apart
            yield moment("backward")
        if kind in "WB":
            held[mine] -= 1
            waiting[mine] -= apart
            left[mine] -= 1
            (fresh if apart else summed).add(mine)
            if not left[mine]:
                yield moment("reduction", mine, apart=False, past=waiting[1])


def amounts(moment: Moment) -> tuple[int, ...]:
    sums = (stage in of for of in (moment.summed, moment.fresh) for stage in (0, 1))
    return (*moment.held, *moment.waiting, moment.held[1] - moment.past, *sums)


def exceeds(one: Moment, other: Moment) -> bool:
    alike = (one.turn, one.reducing, one.reduced, one.apart) == (other.turn, other.reducing, other.reduced, other.apart)
    return alike and one != other and all(map(le, amounts(other), amounts(one)))


@pytest.mark.parametrize("name", schedule.V_SHAPED)
def test_the_fullest_moments_in_a_v(name: Schedule) -> None:
    """Those that no other exceeds, in the order in which they come."""
    for (_, p, m), rank in ((case, rank) for case in V_CASES if case[0] == name for rank in range(case[1])):
        every = list(dict.fromkeys(every_moment(name, p, m, rank)))
        assert moments._in_a_v(name, p, m, rank) == [m for m in every if not any(exceeds(other, m) for other in every)]


def test_a_script_in_a_v_is_the_order_in_short() -> None:
    for (name, p, m), rank in ((case, rank) for case in V_CASES for rank in range(case[1])):
        script = zero_bubble.script(name, p, m, rank)
        found = [each for times, unit in script for each in unit * times]
        assert found == [(kind, int(stage >= p)) for kind, stage, _ in zero_bubble.order(name, p, m, rank)]
        assert len(script) <= 9 + p or m < 2 * p - 1
