"""The search's choice on any small cluster equals that of plain loops over every legal plan, each priced in full."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmdsl.diagnostics import PlanError
from mlmdsl.planner.candidate import Candidate
from mlmdsl.planner.explain import runners_up
from mlmdsl.planner.outcome import Tally
from mlmdsl.planner.pricing import Place
from mlmdsl.planner.refitting import Fitting, slowest
from mlmdsl.planner.search import search
from tests.planner.small import ALIKE, exhausted, fits, legal, pooled, problem
from tests.planner.test_stages import distributions


@given(
    nodes=st.sampled_from([1, 2]),
    per_node=st.sampled_from([1, 2, 3, 4]),
    memory=st.integers(900, 2000),
    batch=st.sampled_from([2, 6, 8, 12]),
    bandwidth=st.sampled_from([1, 10, 100]),
)
@settings(max_examples=15, deadline=None)
def test_the_best_of_all_plans_on_any_small_cluster(nodes: int, per_node: int, memory: int, batch: int, bandwidth: int) -> None:
    """Nothing that a bound leaves out would have been better, every candidate is accounted for, and a search that leaves
    nothing out finds all."""
    spec, graph = problem(ALIKE, nodes=nodes, per_node=per_node, memory=f"{memory} MiB", batch=batch, bandwidth=bandwidth)
    every = list(legal(spec, graph))
    fitting = [place.times(c).total for place, c in every if fits(place, c)]
    left = exhausted(spec, graph)
    over = [place.peak_bytes(c) for place, c in every if not fits(place, c)]
    memory = left.rejected.get(("memory", ""), Tally())
    assert len(left.found) == len(fitting) and left.outpaced == 0
    assert left.bounded <= memory.count == len(over)
    assert memory.distance == min(over, default=inf) - left.setting.capacity_bytes
    assert left.candidates == len(fitting) + sum(tally.count for tally in left.rejected.values())
    if not fitting:
        with pytest.raises(PlanError):
            search(spec, graph)
        return
    plan = search(spec, graph)
    report, refused = plan.search, {each.reason: each.count for each in plan.search.rejected}
    assert plan.predicted.step_time_s == pytest.approx(min(fitting), rel=1e-8)
    assert report.candidates == report.feasible + report.outpaced + sum(refused.values())
    assert report.feasible <= len(fitting) and report.bounded <= refused.get("memory", 0) <= len(over)
    assert plan.alternatives == runners_up(left)


@given(
    per_node=st.sampled_from([1, 2, 3, 4]),
    other_per_node=st.sampled_from([1, 2, 4]),
    memory=st.integers(900, 2200),
    other_memory=st.integers(900, 2200),
    speed=st.sampled_from([40, 100, 300]),
    batch=st.sampled_from([4, 8, 12]),
    least=st.sampled_from([1, 2]),
)
@settings(max_examples=12, deadline=None)
def test_the_best_of_all_plans_on_two_pools(
    per_node: int, other_per_node: int, memory: int, other_memory: int, speed: int, batch: int, least: int
) -> None:
    """Of each plan the distribution whose slowest stage is as fast as any that fits allows, if the one laid out by speed does
    not fit; of all of these the fastest."""
    sizes = {"memory": f"{memory} MiB", "other_memory": f"{other_memory} MiB"}
    rules = (ALIKE, f"require pipeline >= {least}")
    spec, graph = pooled(*rules, per_node=per_node, other_per_node=other_per_node, speed=speed, batch=batch, **sizes)
    every = ((place, c) for place, c in legal(spec, graph) if c.pipeline >= least)
    times = [found for place, c in every if (found := of_any_distribution(place, c)) is not None]
    if not times:
        with pytest.raises(PlanError):
            search(spec, graph)
        return
    assert search(spec, graph).predicted.step_time_s == pytest.approx(min(times), rel=1e-8)


def of_any_distribution(place: Place, c: Candidate) -> float | None:
    """Seconds of the plan, with its layers as they are or as memory allows. Where ranks have one stage each, none of all
    distributions that fit has a faster slowest stage."""
    if fits(place, c):
        return place.times(c).total
    found = Fitting(place, c).within(c) if not place.alike else None
    if c.interleave == 1 and not place.alike:
        cuts = (place.given(stages, c.schedule) for stages in distributions(place.bench.setting.chain.count, place.pipeline))
        fitting = [slowest(place, other) for cut in cuts if fits(place, other := c._replace(cut=cut))]
        assert (found is None) == (not fitting)
        assert found is None or slowest(place, found) == pytest.approx(min(fitting), rel=1e-8)
    if found is None:
        return None
    assert fits(place, found)
    return place.times(found).total
