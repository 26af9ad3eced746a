"""The search's choice on any small cluster equals that of plain loops over every legal plan, each priced in full."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmdsl.diagnostics import PlanError
from mlmdsl.planner.search import search
from tests.planner.small import ALIKE, fits, legal, problem


@given(
    nodes=st.sampled_from([1, 2]),
    per_node=st.sampled_from([1, 2, 3, 4]),
    memory=st.integers(900, 2000),
    batch=st.sampled_from([2, 6, 8, 12]),
    bandwidth=st.sampled_from([1, 10, 100]),
)
@settings(max_examples=15, deadline=None)
def test_the_best_of_all_plans_on_any_small_cluster(nodes: int, per_node: int, memory: int, batch: int, bandwidth: int) -> None:
    """Nothing that a bound leaves out would have been better, and every candidate is accounted for."""
    spec, graph = problem(ALIKE, nodes=nodes, per_node=per_node, memory=f"{memory} MiB", batch=batch, bandwidth=bandwidth)
    every = list(legal(spec, graph))
    fitting = [place.times(c).total for place, c in every if fits(place, c)]
    if not fitting:
        with pytest.raises(PlanError):
            search(spec, graph)
        return
    plan = search(spec, graph)
    report = plan.search
    assert plan.predicted.step_time_s == pytest.approx(min(fitting), rel=1e-8)
    assert report.feasible == len(fitting)
    refused = {each.reason: each.count for each in report.rejected}
    assert report.bounded <= refused.pop("memory", 0) == len(every) - len(fitting)
    assert report.candidates == len(every) + sum(refused.values())
    assert report.outpaced < report.feasible
