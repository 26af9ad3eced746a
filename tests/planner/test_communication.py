"""Alpha-beta times against formulas by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmdsl.planner.communication import Group, collective_seconds, group_of, send_seconds
from mlmdsl.planner.mesh import Mesh
from tests.planner.models import NETWORK

NODE = Group(8, 8, 400e9, 2e-6, 50e9, 5e-6)
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
groups = st.builds(
    lambda nodes, local: Group(nodes * local, local, 400e9, 2e-6, 50e9, 5e-6), st.integers(1, 64), st.sampled_from([1, 2, 4, 8])
)


def test_a_ring_inside_a_node() -> None:
    assert collective_seconds("all_gather", 8e9, NODE) == pytest.approx(7e9 / 400e9 + 7 * 2e-6)
    assert collective_seconds("reduce_scatter", 8e9, NODE) == collective_seconds("all_gather", 8e9, NODE)
    assert collective_seconds("all_reduce", 8e9, NODE) == 2 * collective_seconds("all_gather", 8e9, NODE)


def test_across_nodes_each_member_drives_its_own_share() -> None:
    two_nodes = Group(16, 8, 400e9, 2e-6, 50e9, 5e-6)
    assert collective_seconds("all_gather", 8e9, two_nodes) == pytest.approx(15 / 16 * 8e9 / 400e9 + 7 * 2e-6 + 5e-6)
    strided = Group(16, 1, 400e9, 2e-6, 50e9, 5e-6)
    assert collective_seconds("all_gather", 8e9, strided) == pytest.approx(15 / 16 * 8e9 / 50e9 + 10 * 5e-6)


def test_a_slow_network_is_the_bottleneck() -> None:
    group = Group(16, 8, 400e9, 2e-6, 5e9, 5e-6)
    assert collective_seconds("all_gather", 8e9, group) == pytest.approx(15 / 16 * 1e9 / 5e9, rel=1e-3)


def test_all_to_all_sends_to_every_peer_at_once() -> None:
    assert collective_seconds("all_to_all", 8e9, NODE) == pytest.approx(7e9 / 400e9 + 2e-6)
    two_nodes = Group(16, 8, 400e9, 2e-6, 50e9, 5e-6)
    assert collective_seconds("all_to_all", 8e9, two_nodes) == pytest.approx(4e9 / 50e9 + 5e-6)


def test_nothing_costs_nothing() -> None:
    assert collective_seconds(None, 1e9, NODE) == collective_seconds("split", 1e9, NODE) == 0.0
    assert collective_seconds("all_reduce", 1e9, Group(1, 1, 400e9, 2e-6, 50e9, 5e-6)) == 0.0


def test_sends_cross_nodes_where_any_pair_does() -> None:
    inside = group_of(Mesh(tensor=1, data=4, pipeline=2, devices_per_node=8), "pipeline", NETWORK)
    across = group_of(Mesh(tensor=8, data=4, pipeline=2, devices_per_node=8), "pipeline", NETWORK)
    assert send_seconds(1e9, inside) == pytest.approx(1e9 / (450e9 * 0.78) + 2e-6)
    assert send_seconds(1e9, across) == pytest.approx(1e9 / (50e9 * 0.9) + 5e-6)


@given(groups, st.sampled_from(KINDS), st.floats(0, 1e10), st.floats(0, 1e10))
def test_more_bytes_never_take_less_time(group: Group, kind: str, one: float, other: float) -> None:
    less, more = sorted((one, other))
    assert 0 <= collective_seconds(kind, less, group) <= collective_seconds(kind, more, group)


@given(st.sampled_from(KINDS), st.floats(1e3, 1e10), st.sampled_from([1, 2, 4, 8]))
def test_more_nodes_never_take_less_time(kind: str, size: float, local: int) -> None:
    times = [collective_seconds(kind, size, Group(local * n, local, 400e9, 2e-6, 50e9, 5e-6)) for n in (1, 2, 4, 64, 2048)]
    assert times == sorted(times)
