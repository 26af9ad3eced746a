"""Shipped architectures under every axis: a plan of each in every test run, in turn, all of them by `make parity`."""

from __future__ import annotations

import pytest

from tests.parity.families import PLANS, largest_difference
from tests.parity.lattice import TOLERANCE
from tests.parity.models import FAMILIES

CASES = [(family, PLANS[index % len(PLANS)]) for index, family in enumerate(FAMILIES)]


@pytest.mark.parametrize(("family", "variables"), CASES, ids=lambda value: getattr(value, "described", value))
def test_a_family_keeps_parity(family: str, variables):
    assert largest_difference(family, variables) < TOLERANCE
