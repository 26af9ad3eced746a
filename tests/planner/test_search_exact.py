"""The search's choice on any small cluster equals that of plain loops over every legal plan, each priced in full."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmdsl.diagnostics import PlanError
from mlmdsl.planner.explain import runners_up
from mlmdsl.planner.outcome import Tally
from mlmdsl.planner.search import search
from tests.planner.small import ALIKE, exhausted, fits, legal, problem


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
    over = [place.peak_bytes(c, place.held_bytes(c)) for place, c in every if not fits(place, c)]
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
