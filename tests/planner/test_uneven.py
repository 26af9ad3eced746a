"""Bounds of plans on unlike pools: no plan is faster, or needs less memory, wherever its layers lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlmdsl.diagnostics import PlanError
from mlmdsl.planner.candidate import Candidate
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.proportion import Paces, Speed
from mlmdsl.planner.recomputing import fewest
from mlmdsl.planner.refitting import Fitting
from mlmdsl.planner.rooms import Rooms, Unlike
from mlmdsl.planner.schedule import Course, Runs, pipeline_seconds
from mlmdsl.planner.search import search
from mlmdsl.planner.uneven import Duty, Way, least_at_pace, least_even, least_whole
from tests.planner.small import fits, legal, pooled
from tests.planner.test_stages import distributions

TIGHT: dict[str, int | str] = {"memory": "1100 MiB", "other_memory": "1000 MiB", "per_node": 2, "other_per_node": 2}
ROOMY: dict[str, int | str] = {"memory": "4 GiB", "other_memory": "2 GiB", "per_node": 2, "other_per_node": 2}


def plans(**changes: int | str) -> Iterator[tuple[Place, Candidate]]:
    """Every legal plan with stages on unlike devices, laid out by speed."""
    return ((place, c) for place, c in legal(*pooled(batch=12, **changes)) if not place.alike)


def laid(place: Place, c: Candidate) -> Iterator[Candidate]:
    """In every way, where ranks have one stage each; else by speed, and as memory allows."""
    if c.interleave == 1:
        for stages in distributions(place.bench.setting.chain.count, place.pipeline):
            yield c._replace(cut=place.given(stages, c.schedule))
        return
    yield c
    if (again := Fitting(place, c).within(c)) is not None:
        yield again


def layers(c: Candidate) -> list[int]:
    return [sum(c.cut.stages[stage] for stage in stages) for stages in c.cut.placed]


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [TIGHT, ROOMY])
def test_no_rank_holds_less_than_its_line(sizes: dict[str, int | str]) -> None:
    close = 0
    for place, c in plans(**sizes):
        lines = Rooms(place, c.micro_batch, (c.schedule, c.interleave), (c.recompute,)).lines((c.zero, c.replicate))
        for other in laid(place, c):
            for rank, (line, n) in enumerate(zip(lines, layers(other), strict=True)):
                parts = other.cut.held(rank)
                held = place.rank_bytes(other, rank, parts, place.filling(other, rank, parts))
                least = line.fixed + n * line.least
                assert 0 < least <= held + place.more_context_bytes(c.replicate)
                close += least > 0.9 * held
    assert close > 200


def test_what_there_is_no_room_for_does_not_fit() -> None:
    """And lacks as much at least."""
    refused = 0
    for place, c in plans(**TIGHT):
        over = Rooms(place, c.micro_batch, (c.schedule, c.interleave), (c.recompute,)).over((c.zero, c.replicate))
        if over > 0:
            refused += 1
            assert Fitting(place, c).within(c) is None
            assert all(over <= place.over_bytes(other) and not fits(place, other) for other in laid(place, c))
    assert refused > 100


# ---- time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", [40, 300])
def test_no_plan_that_fits_passes_sooner_than_its_bound(speed: int) -> None:
    """Nor does one that recomputes some layers only."""
    best, close, mixed = list[float](), 0, 0
    memory: dict[str, int | str] = {**TIGHT, "memory": "1400 MiB", "other_memory": "1200 MiB"}
    for place, c in (plan for sizes in (memory, ROOMY) for plan in plans(speed=speed, **sizes)):
        told, share = Unlike(), (c.zero, c.replicate)
        course: Course = (c.schedule, c.interleave)
        alone, _ = told.least(place, c.micro_batch, course, (c.recompute,), share)
        found = [other for other in laid(place, c) if place.over_bytes(other) <= 0]
        best += [min(place.times(other).pipeline for other in found)] if found else []
        assert not found or alone <= best[-1] * (1 + 1e-9)
        close += bool(found) and alone > 0.85 * best[-1]
        for mild in range(c.recompute):
            modes = tuple(range(mild, c.recompute + 1))
            bounds = [told.least(place, c.micro_batch, course, ways, share)[0] for ways in (modes, (mild, c.recompute))]
            for other in found:
                for mixture, _ in fewest(place, other, mild, place.most_bytes):
                    mixed += 1
                    least = max(*bounds, told.laid(place, other, mild))
                    assert least <= place.times(mixture).pipeline * (1 + 1e-9)
    assert len(best) > 400 and close > len(best) / 2 and mixed > 50


@given(
    paces=st.lists(st.floats(0.1, 10), min_size=2, max_size=6),
    work=st.lists(st.floats(0.1, 10), min_size=6, max_size=6),
    more=st.integers(0, 20),
    send=st.floats(0, 2),
)
def test_a_pipeline_of_any_paces_takes_no_less(paces: list[float], work: list[float], more: int, send: float) -> None:
    """Any work on any ranks, two thirds of it in backward passes."""
    p, m = len(paces), len(paces) + more
    busy = [w / pace for w, pace in zip(work, paces, strict=False)]
    runs = with_sends(busy, send)
    for schedule in ("1f1b", "gpipe", "interleaved_1f1b"):
        bound = least_at_pace(schedule, Way(send, (0.0,) * p), m, 1, Paces(sum(work[:p]), tuple(paces)))
        assert bound <= pipeline_seconds("1f1b" if schedule == "interleaved_1f1b" else schedule, runs, m, p, 1) * (1 + 1e-9)


def with_sends(busy: Sequence[float], send: float) -> Runs:
    last = len(busy) - 1
    return tuple((1, s / 3 + send * (i < last), 2 * s / 3 + send * (i > 0), s / 3) for i, s in enumerate(busy))


def test_where_ranks_are_alike_the_bound_is_the_known_one() -> None:
    """W + (m - 1) W / p, and 2 p / (p + 1) W for m = p."""
    for p in (2, 4, 8):
        paces = Paces(float(p), (1.0,) * p)
        for m in (p, p + 1, 4 * p):
            bound = least_at_pace("1f1b", Way(0.0, (0.0,) * p), m, 1, paces)
            known = 2 * p * p / (p + 1) if m == p else p + m - 1
            assert bound == pytest.approx(known, rel=0.02) and bound <= known * (1 + 1e-9)


@given(
    seconds=st.lists(st.floats(0.1, 10), min_size=2, max_size=5),
    interleave=st.integers(2, 4),
    more=st.integers(0, 12),
    first=st.floats(0, 5),
    rounds=st.integers(1, 3),
    send=st.floats(0, 1),
    data=st.data(),
)
@settings(deadline=None)
def test_an_interleaved_pipeline_of_even_stages_takes_no_less(
    seconds: list[float], interleave: int, more: int, first: float, rounds: int, send: float, data: st.DataObject
) -> None:
    """Each rank's layers on its stages, none with two more than an earlier one or fewer than it."""
    p, m = len(seconds), len(seconds) * rounds
    each = data.draw(st.lists(st.integers(interleave, interleave + more), min_size=p, max_size=p))
    stages = [n // interleave + (turn >= interleave - n % interleave) for turn in range(interleave) for n in each]
    busy = [n * seconds[i % p] + first * (i == 0) for i, n in enumerate(stages)]
    assume(busy[0] <= seconds[0] * max(stages[::p]) + first)
    speeds = [Speed((s,), first, 0.0) for s in seconds]
    work = sum(busy[rank::p][turn] / seconds[rank] for rank in range(p) for turn in range(interleave))
    bound = least_even(Way(send, tuple(seconds)), m, interleave, Paces(work, tuple(1 / s for s in seconds)), speeds)
    exact = pipeline_seconds("interleaved_1f1b", with_sends(busy, send), m, p, interleave)
    assert bound <= exact * (1 + 1e-9)
    duties = [Duty(first * (rank == 0), s, sum(each), float("inf"), 0.0) for rank, s in enumerate(seconds)]
    assert least_whole("interleaved_1f1b", Way(send, tuple(seconds)), m, interleave, duties, sum(each)) <= exact * (1 + 1e-9)


@given(st.data(), st.integers(2, 4), st.integers(1, 2))
@settings(max_examples=200, deadline=None)
def test_whole_layers_are_laid_as_well_as_any_distribution(data: st.DataObject, pipeline: int, interleave: int) -> None:
    """Of those that there is room for: the least that the last rank to be done takes."""
    count = data.draw(st.integers(pipeline * interleave, pipeline * interleave + 7))
    floats, most = st.floats(0.1, 10), st.integers(0, count)
    duties = [
        Duty(data.draw(st.floats(0, 5)), data.draw(floats), data.draw(most), data.draw(st.floats(0, 5)), data.draw(floats))
        for _ in range(pipeline)
    ]
    way, m = Way(data.draw(st.floats(0, 1)), tuple(duty.layer for duty in duties)), data.draw(st.integers(1, 9))
    around = zip(way.sends("interleaved_1f1b", interleave), way.before("interleaved_1f1b"), strict=True)
    begun = [m * own + ahead for own, ahead in around]

    def latest(sizes: Sequence[int]) -> float:
        return max(begin + m * duty.seconds(n) for begin, duty, n in zip(begun, duties, sizes, strict=True))

    every = distributions(count, pipeline)
    roomy = [s for s in every if all(interleave <= n <= duty.most for n, duty in zip(s, duties, strict=True))]
    found = least_whole("interleaved_1f1b", way, m, interleave, duties, count)
    assert found == pytest.approx(min(map(latest, roomy), default=float("inf")))


# ---- the choice -----------------------------------------------------------------------------------------------------


@given(
    memory=st.integers(900, 1500),
    other_memory=st.integers(900, 1500),
    speed=st.sampled_from([40, 100, 300]),
    batch=st.sampled_from([4, 8, 12]),
)
@settings(max_examples=8, deadline=None)
def test_the_best_of_all_plans_and_of_those_that_recompute_some_layers(
    memory: int, other_memory: int, speed: int, batch: int
) -> None:
    sizes = {"memory": f"{memory} MiB", "other_memory": f"{other_memory} MiB"}
    spec, graph = pooled(per_node=2, other_per_node=2, speed=speed, batch=batch, **sizes)
    times: list[float] = []
    for place, c in legal(spec, graph):
        found = c if fits(place, c) else None if place.alike else Fitting(place, c).within(c)
        if found is not None:
            mixed = (other for mild in range(c.recompute) for other, _ in fewest(place, found, mild, place.most_bytes))
            times += (place.times(other).total for other in (found, *mixed))
    if not times:
        with pytest.raises(PlanError):
            search(spec, graph)
        return
    assert search(spec, graph).predicted.step_time_s == pytest.approx(min(times), rel=1e-8)
