"""Blocks that nobody foresaw, under tensor 2 x pipeline 2 x data 2."""

from __future__ import annotations

import pytest

from tests.parity.lattice import TOLERANCE
from tests.parity.strange import PLANS, STRANGE, difference

CASES = [(name, PLANS[(i + j) % len(PLANS)]) for i, name in enumerate(STRANGE) for j in range(2)]


@pytest.mark.parametrize(("name", "variables"), CASES, ids=lambda value: getattr(value, "described", value))
def test_a_strange_model_keeps_parity(name: str, variables):
    assert difference(STRANGE[name], variables) < TOLERANCE
