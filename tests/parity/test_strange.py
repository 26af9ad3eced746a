"""Blocks that nobody foresaw, under tensor 2 x pipeline 2 x data 2."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mlmdsl.planner.plan import PlanVariables
from tests.parity.lattice import TOLERANCE
from tests.parity.strange import PLANS, STRANGE, difference
from tests.random_blocks import blocks

CASES = [(name, PLANS[(i + j) % len(PLANS)]) for i, name in enumerate(STRANGE) for j in range(2)]


@pytest.mark.parametrize(("name", "variables"), CASES, ids=lambda value: getattr(value, "described", value))
def test_a_strange_model_keeps_parity(name: str, variables):
    assert difference(STRANGE[name], variables) < TOLERANCE


@given(blocks(most=12), st.sampled_from(PLANS))
@settings(max_examples=6, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
def test_random_blocks_keep_parity(text: str, variables: PlanVariables) -> None:
    """In float64: what a random block computes may magnify rounding by any factor. None of them is made smaller on failure:
    that would take eight processes many times."""
    assert difference(text, variables, double=True) < 1e-10
