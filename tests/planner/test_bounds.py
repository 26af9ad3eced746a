"""No plan is faster than its bounds, and a search that stops finds what one that goes on does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, product
from operator import le

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmdsl.compile import compile_spec
from mlmdsl.grammar.spec import Spec
from mlmdsl.graph.graph import Graph
from mlmdsl.planner.bounds import Share, least_at, least_busy, least_mixed, least_step, rates_of, shares_of
from mlmdsl.planner.candidate import Candidate
from mlmdsl.planner.demand import Demand, demand_of, layer_bytes, loaded_demand, state_bytes
from mlmdsl.planner.loads import interior_of, loads_of
from mlmdsl.planner.outcome import Outcome
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.recomputing import least_that
from mlmdsl.planner.schedule import V_SHAPED, Course, all_full, executable, least_of
from mlmdsl.planner.search import search
from mlmdsl.planner.trade import trade_of
from tests.planner.small import TEXT, exhausted, fits, legal, planned, pooled, problem, shared_cores

ROUTED = (
    TEXT.replace("SwiGLU(RMSNorm(h), hidden = 3 * d)", "Experts(RMSNorm(h), experts = 8, top_k = 2, hidden = 512)")
    .replace("seq_len = 512", "seq_len = 16_384")
    .replace("layers = 6", "layers = 4")
)


def routed(*plan: str) -> tuple[Spec, Graph]:
    """Long sequences over experts, on two nodes of two."""
    lines = "\n".join(("pin tensor = 1", *plan))
    text = ROUTED.format(nodes=2, per_node=2, memory="20 GiB", bandwidth=100, batch=4, plan=lines)
    done = compile_spec(text, path="/specs/x.mlm", until="graph")
    assert done.spec is not None and done.graph is not None
    return done.spec, done.graph


CASES = {
    "dense": lambda: problem(memory="4 GiB"),
    "slow links": lambda: problem(memory="1100 MiB", bandwidth=1, nodes=1),
    "copies": lambda: problem(memory="4 GiB", nodes=2, per_node=2, batch=8),
    "routed": routed,
    "shared cores": shared_cores,
}


@pytest.fixture(scope="module", params=CASES)
def outcome(request: pytest.FixtureRequest) -> Outcome:
    return exhausted(*CASES[request.param]())


def modes_of(c: Candidate) -> tuple[int, ...]:
    return tuple(sorted(set(c.modes))) or (c.recompute,)


def share_of(place: Place, c: Candidate) -> Share:
    return shares_of(place, [(c.zero, c.replicate)])[c.zero, c.replicate]


def demands(place: Place, c: Candidate, modes: tuple[int, ...]) -> Iterator[Demand]:
    """However layers are cut, and as they are, where all are alike."""
    course, m = (c.schedule, c.interleave), place.micro_batches(c.micro_batch)
    held = rates_of(place, c.micro_batch, modes, c.schedule in V_SHAPED).held
    yield demand_of(place, held, m, (course,))
    if place.pipeline > 1 and place.alike and len(place.bench.setting.chain.kinds) == 1:
        yield loaded_demand(place, held, m, course, (c.cut.stages,))


def least_seconds(place: Place, c: Candidate, modes: tuple[int, ...]) -> list[float]:
    """By demand."""
    rates, share, m = rates_of(place, c.micro_batch, modes, c.schedule in V_SHAPED), share_of(place, c), c.micro_batch
    course = (c.schedule, c.interleave)
    return [least_step(place, share, rates, place.micro_batches(m), course, demand) for demand in demands(place, c, modes)]


def test_no_plan_takes_less_than_its_bounds(outcome: Outcome) -> None:
    """With the ways of recomputing that it has, and with any; with its micro-batch, and with this one or a larger one."""
    assert len(outcome.found) > 50
    for number, found in enumerate(outcome.found):
        c, place = found.candidate, found.place
        total = (found if found.exact else outcome.made_exact(number)).times.total
        batch, share, v_shaped = place.bench.setting.spec.train.batch, share_of(place, c), c.schedule in V_SHAPED
        any_way, course = (0,) if v_shaped else (0, 1, 2), (c.schedule, c.interleave)
        every = rates_of(place, batch, any_way, v_shaped)
        assert 0 < least_busy(place, batch) <= total
        for size in (n for n in range(1, c.micro_batch + 1) if c.micro_batch % n == 0):
            (least,) = least_at(place, [share], every, size, (course,), (course,), batch, True)
            assert least.over <= 0 < least.seconds <= total
        (coarse,) = least_at(place, [share], every, c.micro_batch, (course,), (), batch, True)
        assert coarse.over <= 0 < coarse.seconds <= total
        (near,) = least_at(
            place, [share], rates_of(place, c.micro_batch, any_way, v_shaped), c.micro_batch, (course,), balanced=True
        )
        assert near.over <= 0 < near.seconds <= total
        own, free = least_seconds(place, c, modes_of(c)), least_seconds(place, c, any_way)
        assert 0.2 * total < max(own) <= total and max(free) <= total


def test_plans_that_recompute_some_layers_take_no_less_than_their_bounds() -> None:
    """Of which memory says how many; and the bound is near: it knows of the rank that has to recompute the most."""
    outcome, near, nearer = exhausted(*problem(memory="1400 MiB", nodes=1, per_node=4, batch=16)), 0, 0
    mixed = [found for found in outcome.found if found.candidate.modes]
    for found in mixed:
        c, place = found.candidate, found.place
        mild, total = min(c.modes), place.times(c).total
        bound = max(least_seconds(place, c, modes_of(c)))
        rates, dear = rates_of(place, c.micro_batch, modes_of(c), False), c._replace(modes=())
        told = [least_mixed(place, share_of(place, c), rates, dear, mild, demand) for demand in demands(place, c, modes_of(c))]
        assert bound <= total and max(told) <= total
        near += bound > 0.95 * total
        nearer += max(told) > 0.95 * total
    assert len(mixed) > 40 and near > len(mixed) / 3 and nearer > len(mixed) / 4


@given(
    layers=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    points=st.lists(st.tuples(st.integers(0, 50), st.floats(0.1, 10)), min_size=9, max_size=9),
    choices=st.lists(st.integers(0, 2), min_size=12, max_size=12),
)
def test_no_mixture_trades_memory_for_less_time(layers: list[int], points: list[tuple[int, float]], choices: list[int]) -> None:
    """Each layer in any of three ways."""
    kinds = [(count, points[3 * kind : 3 * kind + 3]) for kind, count in enumerate(layers)]
    trade = trade_of(kinds)
    ways = iter(choices)
    chosen = [each[next(ways)] for count, each in kinds for _ in range(count)]
    kept, seconds = sum(size for size, _ in chosen), sum(seconds for _, seconds in chosen)
    mildest = sum(count * each[0][1] for count, each in kinds)
    fastest = sum(count * min(s for b, s in each if b <= each[0][0]) for count, each in kinds)
    assert trade.least <= kept
    if all(seconds >= each[0][1] for _, each in kinds for _, seconds in each):  # a milder way is a quicker one
        assert trade.seconds(trade.kept - kept) <= seconds - mildest + 1e-9 * seconds and fastest >= mildest - 1e-9
    assert trade.seconds(0) == 0 and trade.seconds(trade.kept - trade.least) < float("inf")


def test_ranks_of_a_v_hold_what_their_warm_up_leaves() -> None:
    """At least: on every rank of every plan, whether it fits or not."""
    spec, graph = problem("pin interleave = 2", memory="4 GiB", nodes=1, per_node=4, batch=8)
    found = [(place, c) for place, c in legal(spec, graph) if c.schedule in V_SHAPED]
    assert len(found) >= 20
    for place, c in found:
        for rank, parts in c.cut.ranks:
            whole = place.rank_bytes(c, rank, parts, place.filling(c, rank, parts))
            assert 0.5 * whole < place.least_rank_bytes(c, rank, parts) <= whole


def test_without_a_pipeline_and_zero_the_bound_is_the_time(outcome: Outcome) -> None:
    alone = [f for f in outcome.found if f.candidate.pipeline == f.candidate.tensor == 1]
    plain = [f for f in alone if not f.candidate.zero and not f.candidate.modes]
    assert plain
    for found in plain:
        c, place = found.candidate, found.place
        assert least_seconds(place, c, (c.recompute,)) == [pytest.approx(place.times(c).total, rel=1e-6)]


@pytest.mark.parametrize(
    "plan", [(), ("prefer zero == 3", "avoid expert == 1"), ("minimize memory",), ("pin recompute = full",)]
)
def test_a_search_that_leaves_nothing_out_finds_no_better(plan: tuple[str, ...]) -> None:
    spec, graph = routed(*plan)
    chosen, every = search(spec, graph), exhausted(spec, graph)
    best = min(every.found, key=lambda found: found.order())
    assert chosen.predicted.step_time_s == pytest.approx(best.place.times(best.candidate).total, rel=1e-8)
    assert every.outpaced == 0 < chosen.search.outpaced
    assert chosen.search.candidates - chosen.search.feasible - chosen.search.outpaced == sum(
        rejection.count for rejection in chosen.search.rejected
    )


def test_a_wish_that_no_branch_keeps_is_not_looked_for() -> None:
    """What all candidates of a branch break is not opened to price the wish."""
    plain, wished = planned(), planned("prefer pipeline == 5")
    assert wished.soft[0].price_s is None and wished.plan == plain.plan
    assert wished.search.feasible == plain.search.feasible


@pytest.mark.parametrize("most", [0, 1, 5, 12])
@pytest.mark.parametrize("near", [None, lambda n: n // 2, lambda n: 2 * n + 1, lambda n: 5])
def test_the_least_is_found_from_any_guess(most: int, near: Callable[[int], int] | None) -> None:
    """Wherever one is told to look next."""
    for least in range(most + 2):
        for guess in range(most + 3):
            assert least_that(partial(le, least), most, guess, near) == least


# ---- memory ---------------------------------------------------------------------------------------------------------


def branches_of(spec: Spec, graph: Graph) -> Iterator[tuple[Place, Candidate, tuple[Course, ...]]]:
    """Every legal plan, with all the schedules that share its mesh, micro-batch and way of recomputing."""
    every = list(legal(spec, graph))
    alike: dict[tuple[object, ...], dict[Course, None]] = {}
    for _, c in every:
        alike.setdefault((c.tensor, c.pipeline, c.data, c.micro_batch, c.recompute), {})[c.schedule, c.interleave] = None
    for place, c in every:
        yield place, c, tuple(alike[c.tensor, c.pipeline, c.data, c.micro_batch, c.recompute])


@pytest.mark.parametrize("memory", ["900 MiB", "1000 MiB"])
def test_no_plan_holds_less_than_its_bounds(memory: str) -> None:
    """Of all schedules together, of its own, and as its layers are cut; and where a bound says that it cannot fit, it does
    not."""
    refused = close = 0
    for place, c, courses in branches_of(*problem(memory=memory, nodes=2, per_node=2, batch=8)):
        share, peak, modes = share_of(place, c), place.peak_bytes(c), (c.recompute,)
        rates = rates_of(place, c.micro_batch, modes, c.schedule in V_SHAPED)
        free = rates.held._replace(working=(min(rates.held.working),) * 2)
        together = demand_of(place, free, place.micro_batches(c.micro_batch), courses)
        overs = [
            demand.over(demand.may_keep(share.states), share.states, rates.trade.kept)
            for demand in (together, *demands(place, c, modes))
        ]
        assert overs[0] + place.most_bytes > 0 and overs[0] <= overs[1] + 1 and max(overs) <= peak - place.most_bytes
        close += max(overs) + place.most_bytes > 0.9 * peak
        batch = place.bench.setting.spec.train.batch
        largest = rates_of(place, batch, modes, c.schedule in V_SHAPED)
        (least,) = least_at(place, [share], largest, c.micro_batch, ((c.schedule, c.interleave),), of=batch, balanced=True)
        assert least.over <= peak - place.most_bytes
        if max(overs) > 0:
            refused += 1
            assert not fits(place, c)
    assert refused > 20 and close > 200


@pytest.mark.parametrize("made", [lambda: problem(memory="4 GiB", nodes=2, per_node=2, batch=8), routed])
def test_state_of_one_layer_more(made: Callable[[], tuple[Spec, Graph]]) -> None:
    """Is what a stage with two layers has more than one with one."""
    seen = set[tuple[bool, int, bool]]()
    for place, c in legal(*made()):
        if place.pipeline == 1:
            continue
        sharing = place.sharing(c.zero, c.replicate, 1)
        one, two = (place.bench.setting.chain.part((n,), False, False) for n in (1, 2))
        for summed in (False, True):
            more = state_bytes(place, two, sharing, summed) - state_bytes(place, one, sharing, summed)
            assert layer_bytes(place, sharing, summed) == more > 0
            seen.add((place.expert > 1, sharing.zero, summed))
    assert len(seen) >= 8


def test_interior_ranks_have_no_less_than_the_bound_says() -> None:
    """Of layers that are alike and balanced."""
    seen = 0
    for place, c in legal(*problem(memory="4 GiB", nodes=1, per_node=6, batch=12)):
        if place.pipeline > 2:
            seen += 1
            m, course = place.micro_batches(c.micro_batch), (c.schedule, c.interleave)
            for rank, least in zip(
                (1, place.pipeline - 2), interior_of(all_full((course,), place.pipeline, m), place.pipeline, 6), strict=False
            ):
                mine = c.cut.placed[rank]
                assert 0 < least.even <= least.layers <= sum(c.cut.stages[stage] for stage in mine)
                assert least.before <= sum(c.cut.stages[: mine[0]])
                loads = [load for load in loads_of(course, place.pipeline, m, c.cut.stages) if load.layers >= least.layers]
                assert any(load.total >= least.total and load.place.links >= least.links for load in loads)
    assert seen > 50


# ---- unlike pools ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", [40, 300])
def test_no_plan_on_unlike_pools_takes_less_than_its_bounds(speed: int) -> None:
    """However its layers are laid on the stages (test_uneven.py has the bounds that know the ranks)."""
    for place, c in legal(*pooled(speed=speed, per_node=2, other_per_node=2, memory="4 GiB", other_memory="4 GiB")):
        batch, share, total, course = (
            place.bench.setting.spec.train.batch,
            share_of(place, c),
            place.times(c).total,
            (c.schedule, c.interleave),
        )
        largest = rates_of(place, batch, modes_of(c), c.schedule in V_SHAPED)
        (least,) = least_at(place, [share], largest, c.micro_batch, (course,), (course,), batch)
        assert 0 < least.seconds <= total and 0 < least_busy(place, batch) <= total
        (near,) = least_at(
            place, [share], rates_of(place, c.micro_batch, modes_of(c), c.schedule in V_SHAPED), c.micro_batch, (course,)
        )
        assert 0 < near.seconds <= total
        assert 0.2 * total < max(least_seconds(place, c, modes_of(c))) <= total


def test_of_larger_micro_batches_ranks_hold_as_many_sequences() -> None:
    """Under any schedules that are legal with them."""
    for p, rows, layers in product((2, 3, 4, 6, 8, 12), (8, 12, 24, 60, 96, 128), (2, 5)):
        every: list[tuple[Course, ...]] = [
            (("1f1b", 1), ("gpipe", 1), *(("interleaved_1f1b", v) for v in range(2, layers + 1))),
            (("zb_v", 2), ("dualpipe_v", 2)),
        ]
        for family in every:
            most = 0.0
            for size in (n for n in range(1, rows + 1) if rows % n == 0):
                courses = tuple(course for course in family if executable(course[0], p, rows // size))
                held = size * least_of(courses, p, rows // size)[1].kept if courses else most
                assert held >= most * (1 - 1e-9)
                most = held
            sizes = [n for n in range(1, rows + 1) if rows % n == 0]
            legal_with = {n: [course for course in family if executable(course[0], p, rows // n)] for n in sizes}
            for size, larger in combinations([n for n in sizes if legal_with[n]], 2):
                ever = tuple({course: None for n in sizes if n >= size for course in legal_with[n]})
                for course in legal_with[larger]:
                    full = (all_full(of, p, rows // n) for of, n in ((ever, size), ((course,), larger)))
                    pairs = (interior_of(each, p, p * layers + 1) for each in full)
                    for least, own in zip(*pairs, strict=True):
                        assert own.total * larger >= least.total * size * (1 - 1e-9)
                        assert own.layers >= least.layers and own.links >= least.links and own.before >= least.before
