"""No plan is faster than its bounds, and a search that stops finds what one that goes on does."""

from __future__ import annotations

from functools import partial
from operator import le

import pytest

from mlmdsl.compile import compile_spec
from mlmdsl.grammar.spec import Spec
from mlmdsl.graph.graph import Graph
from mlmdsl.planner.bounds import least_from, least_seconds, overhead_of
from mlmdsl.planner.outcome import Outcome
from mlmdsl.planner.recomputing import least_that
from mlmdsl.planner.search import search
from tests.planner.small import TEXT, exhausted, planned, problem

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
