"""The grid of ranks against enumeration."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmdsl.grammar.constraints import ORDERS
from mlmdsl.planner.mesh import Mesh, shares_out
from mlmdsl.runtime.config import Parallel
from tests.planner.models import INFINIBAND, NETWORK, NVLINK

AXES = ("tensor", "data", "pipeline", "world", "context", "replicas", "expert", "copies", "shards", "replicate")


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    tensor, data, pipeline, context = (draw(st.integers(1, 4)) for _ in range(4))
    node, order = draw(st.integers(1, 9)), draw(st.sampled_from(ORDERS))
    experts = (n for n in range(1, data * context + 1) if data * context % n == 0 and shares_out(order, context, n))
    expert = draw(st.sampled_from(list(experts)))
    replicate = draw(st.sampled_from([n for n in range(1, data + 1) if data % n == 0]))
    return Mesh(tensor, data, pipeline, node, context, expert, replicate, order)


def groups_of(mesh: Mesh) -> dict[str, set[tuple[int, ...]]]:
    """By torch, as the runtime's device mesh is made."""
    sizes = {"pipeline": mesh.pipeline, "data": mesh.data, "context": mesh.context, "tensor": mesh.tensor}
    names = mesh.order.split("_")
    grid = torch.arange(mesh.world_size).view(*(sizes[name] for name in names))
    grid = grid.permute(*(names.index(name) for name in sizes))  # pipeline, data, context, tensor
    rows = grid.permute(0, 3, 1, 2).flatten(2)  # pipeline, tensor, replicas
    found = {axis: grid.movedim(i, -1).flatten(0, 2) for i, axis in enumerate(sizes)}
    found |= {
        "world": grid.permute(*(list(sizes).index(name) for name in names)).reshape(1, -1),
        "replicas": rows.flatten(0, 1),
    }
    for inner, outer, size in (("expert", "copies", mesh.expert), ("shards", "replicate", mesh.replicas // mesh.replicate)):
        parts = rows.unflatten(2, (-1, size))
        found |= {inner: parts.flatten(0, 2), outer: parts.transpose(2, 3).flatten(0, 2)}
    return {axis: {tuple(group) for group in groups.tolist()} for axis, groups in found.items()}


@given(meshes())
@settings(deadline=None)
def test_groups_partition_the_ranks(mesh: Mesh) -> None:
    assert mesh.world_size == mesh.tensor * mesh.context * mesh.data * mesh.pipeline
    expected = groups_of(mesh)
    for axis in AXES:
        groups = list(mesh.groups(axis))
        assert set(groups) == expected[axis]
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
        assert all(len(group) == mesh.size(axis) for group in groups)
        assert all(mesh.ranks(axis, rank) == group for group in groups for rank in group)


@given(meshes())
@settings(deadline=None)
def test_groups_share_all_other_coordinates(mesh: Mesh) -> None:
    assert [mesh.rank(*mesh.coordinates(rank)) for rank in range(mesh.world_size)] == list(range(mesh.world_size))
    for position, axis in enumerate(("pipeline", "data", "context", "tensor")):
        for group in mesh.groups(axis):
            coordinates = [mesh.coordinates(rank) for rank in group]
            assert [c[position] for c in coordinates] == list(range(mesh.size(axis)))
            assert len({(*c[:position], *c[position + 1 :]) for c in coordinates}) == 1


@given(meshes())
@settings(deadline=None)
def test_the_runtime_lays_out_the_same_grid(mesh: Mesh) -> None:
    degrees = dict(pipeline=mesh.pipeline, data=mesh.data, context=mesh.context, tensor=mesh.tensor)
    grid = Parallel(**degrees, order=mesh.order).grid
    for stage, column, replica in product(range(mesh.pipeline), range(mesh.tensor), range(mesh.replicas)):
        data, context = divmod(replica, mesh.context)
        assert grid[stage][column][replica] == mesh.rank(stage, data, context, column)


@given(meshes())
@settings(deadline=None)
def test_nodes_crossed_are_those_of_the_worst_group(mesh: Mesh) -> None:
    for axis in AXES:
        counts = [Counter(rank // mesh.devices_per_node for rank in group) for group in mesh.groups(axis)]
        assert mesh.per_node(axis) == min(min(count.values()) for count in counts)
        assert mesh.crosses_nodes(axis) == any(len(count) > 1 for count in counts)


@given(meshes())
@settings(deadline=None)
def test_one_order_brings_stages_together_the_other_one_replicas(mesh: Mesh) -> None:
    """What the search leaves out: where stages lie apart in both orders, replicas lie nowhere nearer than in the usual one."""
    usual, other = (replace(mesh, expert=1, replicate=1, order=order) for order in ORDERS)
    assert other.crosses_nodes("pipeline") <= usual.crosses_nodes("pipeline")
    if usual.crosses_nodes("pipeline") and not other.crosses_nodes("pipeline"):
        assert usual.devices_per_node % (usual.tensor * usual.context * usual.pipeline) == 0
    if usual.devices_per_node % (usual.tensor * usual.context) == 0:
        assert usual.per_node("replicas") >= other.per_node("replicas")


def test_a_usual_mesh() -> None:
    mesh = Mesh(tensor=8, data=4, pipeline=2, devices_per_node=8)
    assert mesh.ranks("tensor", 9) == tuple(range(8, 16))
    assert mesh.ranks("data", 9) == (1, 9, 17, 25)
    assert mesh.ranks("pipeline", 9) == (9, 41)
    assert [mesh.crosses_nodes(axis) for axis in AXES[:4]] == [False, True, True, True]
    assert NETWORK.link(mesh, "tensor") == NVLINK and NETWORK.link(mesh, "data") == INFINIBAND


def test_stages_inside_a_node() -> None:
    """Two nodes of 8 devices: 4 replicas of 2 stages of 2 ranks each."""
    usual = Mesh(tensor=2, data=4, pipeline=2, devices_per_node=8)
    other = replace(usual, order="data_pipeline_context_tensor")
    assert usual.ranks("pipeline", 3) == (3, 11) and usual.ranks("data", 3) == (1, 3, 5, 7)
    assert other.ranks("pipeline", 3) == (1, 3) and other.ranks("data", 3) == (3, 7, 11, 15)
    assert NETWORK.link(usual, "pipeline") == NETWORK.link(other, "data") == INFINIBAND
    assert NETWORK.link(other, "pipeline") == NETWORK.link(usual, "data") == NVLINK
    assert replace(other, context=2, tensor=1).ranks("replicas", 0) == (0, 1, 4, 5, 8, 9, 12, 13)


def test_a_large_mesh_is_not_enumerated() -> None:
    mesh = Mesh(tensor=8, data=128, pipeline=16, devices_per_node=8)
    assert [mesh.per_node(axis) for axis in AXES[:4]] == [8, 1, 1, 8]
    inside = Mesh(tensor=1, data=2048, pipeline=2, devices_per_node=8, context=4, order="data_pipeline_context_tensor")
    assert [inside.per_node(axis) for axis in ("context", "pipeline", "replicas", "data")] == [4, 2, 4, 1]
    assert Mesh(tensor=16, data=64, pipeline=16, devices_per_node=8).per_node("tensor") == 8


def test_a_degree_that_does_not_divide_a_node_crosses_somewhere() -> None:
    assert Mesh(tensor=3, data=8, pipeline=1, devices_per_node=8).crosses_nodes("tensor")
    assert not Mesh(tensor=3, data=2, pipeline=1, devices_per_node=8).crosses_nodes("tensor")
