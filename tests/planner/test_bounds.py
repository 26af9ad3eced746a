"""No plan is faster than its bounds, and a search that stops finds what one that goes on does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from operator import le

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmdsl.compile import compile_spec
from mlmdsl.grammar.spec import Spec
from mlmdsl.graph.graph import Graph
from mlmdsl.planner.bounds import least_from, least_pipeline, least_seconds, least_uneven, overhead_of
from mlmdsl.planner.outcome import Outcome
from mlmdsl.planner.pricing import Candidate, Place, Sums
from mlmdsl.planner.proportion import Paces
from mlmdsl.planner.recomputing import least_that
from mlmdsl.planner.schedule import V_SHAPED, Course, pipeline_seconds
from mlmdsl.planner.search import search
from tests.planner.small import TEXT, exhausted, fits, legal, planned, pooled, problem, shared_cores
from tests.planner.test_stages import distributions

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


def test_no_plan_takes_less_than_its_bounds(outcome: Outcome) -> None:
    """Of its branch, and of all with this micro-batch or a larger one."""
    assert len(outcome.found) > 50
    for number, found in enumerate(outcome.found):
        c, place = found.candidate, found.place
        mildest = min(c.modes, default=c.recompute)
        overheads = [overhead_of(place, c.zero, c.replicate)]
        bound = least_seconds(place, overheads, c.micro_batch, mildest, ((c.schedule, c.interleave),))
        total = (found if found.exact else outcome.made_exact(number)).times.total
        assert 0 < least_from(place, overheads, c.micro_batch) <= total and 0.2 * total < bound <= total


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
        bound = least_seconds(place, [overhead_of(place, 0, 1)], c.micro_batch, c.recompute, ((c.schedule, 1),))
        assert bound == pytest.approx(place.times(c).total, rel=1e-6)


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
def test_the_least_is_found_from_any_guess(most: int) -> None:
    for least in range(most + 2):
        for guess in range(most + 3):
            assert least_that(partial(le, least), most, guess) == least


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
    """Of its mesh, of all schedules together, and of its own; and where a bound says that it cannot fit, it does not."""
    refused = 0
    for place, c, courses in branches_of(*problem(memory=memory, nodes=2, per_node=2, batch=8)):
        own, states = ((c.schedule, c.interleave),), place.least_states(c.zero, c.replicate)
        least = place.least_under(c.micro_batch, c.recompute, own, states)
        any_schedule = place.least_under(c.micro_batch, c.recompute, courses, states)
        assert 0 < place.least_bytes(c.micro_batch, states.plain) <= any_schedule <= least <= place.peak_bytes(c)
        for known in (own, courses):
            most = place.most_states(c.micro_batch, c.recompute, known)
            if not any(map(le, states, most)):
                refused += 1
                assert place.least_under(c.micro_batch, c.recompute, known, states) > place.most_bytes
                assert not fits(place, c)
    assert refused > 20


# ---- unlike pools ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", [40, 300])
def test_no_plan_on_unlike_pools_takes_less_than_its_bounds(speed: int) -> None:
    """However its layers are laid on the stages; and the bound sees the slow ranks."""
    closer = 0
    for place, c in legal(*pooled(speed=speed, per_node=2, other_per_node=2, memory="4 GiB", other_memory="4 GiB")):
        overheads, course = [overhead_of(place, c.zero, c.replicate)], (c.schedule, c.interleave)
        bound = least_seconds(place, overheads, c.micro_batch, c.recompute, (course,))
        total = place.times(c).total
        assert 0 < least_from(place, overheads, c.micro_batch) <= total and 0.3 * total < bound <= total
        if not place.alike and c.interleave == 1:
            m, send, sums = (
                place.micro_batches(c.micro_batch),
                place.least_send(c.micro_batch),
                place.sums(c.micro_batch, c.recompute),
            )
            even = least_pipeline(c.schedule, sums, send, m, place.pipeline, 1)
            uneven = least_uneven(c.schedule, sums, send, m, place.paces(c.micro_batch, c.recompute))
            closer += uneven > even
            for stages in distributions(place.bench.setting.chain.count, place.pipeline):
                assert bound <= place.times(c._replace(cut=place.given(stages, c.schedule))).total
    assert closer > 10


@given(
    paces=st.lists(st.floats(0.1, 10), min_size=2, max_size=6),
    work=st.lists(st.floats(0.1, 10), min_size=6, max_size=6),
    more=st.integers(0, 20),
)
def test_a_pipeline_of_any_paces_takes_no_less(paces: list[float], work: list[float], more: int) -> None:
    """Any work on any ranks, two thirds of it in backward passes."""
    p, m = len(paces), len(paces) + more
    runs = tuple((1, w / pace / 3, 2 * w / pace / 3, w / pace / 3) for w, pace in zip(work, paces, strict=False))
    done, whole = sum(work[:p]), sum(w / pace for w, pace in zip(work, paces, strict=False))
    sums = Sums(whole / 3, 2 * whole / 3, whole / 3, 0.0, 0.0, 0)
    for schedule in ("1f1b", "gpipe"):
        bound = least_uneven(schedule, sums, 0.0, m, Paces(done, tuple(paces)))
        assert bound <= pipeline_seconds(schedule, runs, m, p, 1) * (1 + 1e-9)
