"""The grid of ranks against enumeration."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mlmdsl.planner.mesh import Mesh
from tests.planner.models import INFINIBAND, NETWORK, NVLINK

AXES = ("tensor", "data", "pipeline", "world", "context", "replicas")
meshes = st.builds(Mesh, *[st.integers(1, 5)] * 3, st.integers(1, 9), st.integers(1, 4))


@given(meshes)
def test_groups_partition_the_ranks(mesh: Mesh) -> None:
    assert mesh.world_size == mesh.tensor * mesh.context * mesh.data * mesh.pipeline
    for axis in AXES:
        groups = list(mesh.groups(axis))
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
        assert all(len(group) == mesh.size(axis) for group in groups)
        assert all(mesh.ranks(axis, rank) == group for group in groups for rank in group)


@given(meshes)
def test_groups_share_all_other_coordinates(mesh: Mesh) -> None:
    for position, axis in enumerate(("pipeline", "data", "context", "tensor")):
        for group in mesh.groups(axis):
            coordinates = [mesh.coordinates(rank) for rank in group]
            assert [c[position] for c in coordinates] == list(range(mesh.size(axis)))
            assert len({(*c[:position], *c[position + 1 :]) for c in coordinates}) == 1


@given(meshes)
def test_nodes_crossed_are_those_of_the_worst_group(mesh: Mesh) -> None:
    for axis in AXES:
        counts = [Counter(rank // mesh.devices_per_node for rank in group) for group in mesh.groups(axis)]
        assert mesh.per_node(axis) == min(min(count.values()) for count in counts)
        assert mesh.crosses_nodes(axis) == any(len(count) > 1 for count in counts)


def test_a_usual_mesh() -> None:
    mesh = Mesh(tensor=8, data=4, pipeline=2, devices_per_node=8)
    assert mesh.ranks("tensor", 9) == tuple(range(8, 16))
    assert mesh.ranks("data", 9) == (1, 9, 17, 25)
    assert mesh.ranks("pipeline", 9) == (9, 41)
    assert [mesh.crosses_nodes(axis) for axis in AXES[:4]] == [False, True, True, True]
    assert NETWORK.link(mesh, "tensor") == NVLINK and NETWORK.link(mesh, "data") == INFINIBAND


def test_a_large_mesh_is_not_enumerated() -> None:
    mesh = Mesh(tensor=8, data=128, pipeline=16, devices_per_node=8)
    assert [mesh.per_node(axis) for axis in AXES[:4]] == [8, 1, 1, 8]
    assert Mesh(tensor=16, data=64, pipeline=16, devices_per_node=8).per_node("tensor") == 8


def test_a_degree_that_does_not_divide_a_node_crosses_somewhere() -> None:
    assert Mesh(tensor=3, data=8, pipeline=1, devices_per_node=8).crosses_nodes("tensor")
    assert not Mesh(tensor=3, data=2, pipeline=1, devices_per_node=8).crosses_nodes("tensor")
