"""Re-derives the typing of a plan's layout: a wrong placement fails here, not as a wrong gradient in training."""

from __future__ import annotations

from collections.abc import Mapping

from mlmdsl.graph.graph import Graph, Region
from mlmdsl.graph.ops import CATALOGUE
from mlmdsl.graph.placement import Placement, parse_placement, parse_weight_placement
from mlmdsl.planner.placement import transition
from mlmdsl.planner.plan import NodeLayout, Plan, Transition


def verify_layout(graph: Graph, plan: Plan) -> None:
    """Every node's strategy is one that its operation offers, every value reaches each consumer in the placement that it asks for, by
    a legal transition or none; tied weights lie alike; without sequence parallelism no sequence is cut. AssertionError says where
    not."""
    if plan.plan.tensor == 1:
        return
    nodes = {node.path: node for region in plan.layout for node in region.nodes}
    assert set(nodes) == set(graph.nodes), f"the layout has other nodes than the graph: {set(nodes) ^ set(graph.nodes)}"
    moves = {(t.value, t.target, c): t for region in plan.layout for t in region.transitions for c in t.consumers}
    used: set[tuple[str, str, str]] = set()
    for path, layout in nodes.items():
        _verify_strategy(graph, plan, layout)
        for index, source in enumerate(graph.nodes[path].inputs):
            left = _found(graph, nodes, source, graph.region_of[path])
            used |= _verify_use(graph, moves, source, left, layout.inputs[index], path)
    for region in graph.regions:
        for carried in region.carried:
            for value, inside in ((carried.initial, False), (carried.next, True)):
                left = nodes[value].output if inside else _found(graph, nodes, value, region)
                used |= _verify_use(graph, moves, value, left, nodes[carried.entry].output, carried.entry)
    assert used == set(moves), f"transitions that nothing asks for: {set(moves) - used}"
    _verify_weights(graph, nodes)


def _found(graph: Graph, nodes: Mapping[str, NodeLayout], value: str, region: Region) -> str:
    """How a value lies where `region` finds it: after a repeat, as its boundary does."""
    home = graph.region_of[value]
    if home is not region:
        for carried in home.carried:
            if carried.next == value:
                return nodes[carried.entry].output
    return nodes[value].output


def _verify_use(
    graph: Graph, moves: Mapping[tuple[str, str, str], Transition], value: str, left: str, wanted: str, consumer: str
) -> set[tuple[str, str, str]]:
    """The transition used, as a set of one; empty where the value already lies as wanted."""
    if left == wanted:
        return set()
    key = (value, wanted, consumer)
    assert key in moves, f"{value} lies as {left}, {consumer} wants {wanted}, and nothing brings it there"
    found = moves[key]
    assert found.source == left, f"the transition of {value} for {consumer} starts from {found.source}, it lies as {left}"
    row = transition(parse_placement(left), parse_placement(wanted), integer=graph.nodes[value].type.dtype == "int")
    assert row is not None, f"{value}: there is no way from {left} to {wanted}"
    assert (row.forward, row.backward, row.dim, row.target_dim) == (
        found.forward,
        found.backward,
        found.dim,
        found.target_dim,
    ), f"{value}: {left} to {wanted} is {row.forward} and {row.backward}, not {found.forward} and {found.backward}"
    return {key}


def _verify_strategy(graph: Graph, plan: Plan, layout: NodeLayout) -> None:
    node = graph.nodes[layout.path]
    types = tuple(graph.nodes[source].type for source in node.inputs)
    shapes = tuple(graph.weights[key].shape for key in node.weights)
    inputs = tuple(map(parse_placement, layout.inputs))
    weights = tuple(parse_weight_placement(text) for text in layout.weights)
    output = parse_placement(layout.output)
    for offered in CATALOGUE[node.op].strategies(types, node.type, shapes, node.attrs, plan.plan.tensor):
        alike = (offered.name, offered.inputs, offered.output) == (layout.strategy, inputs, output)
        # a weight with several uses is partial where any of them is
        if alike and all(
            a.dim == b.dim and a.partial_gradient <= b.partial_gradient for a, b in zip(offered.weights, weights, strict=True)
        ):
            break
    else:
        raise AssertionError(
            f"{layout.path}: {node.op} offers no strategy {layout.strategy} with {layout.inputs} -> {layout.output}"
        )
    if not plan.plan.sequence_parallel:
        for type, placement in zip((*types, node.type), (*inputs, output), strict=True):
            assert not _cuts_symbol(type.shape, placement), f"{layout.path}: the sequence is cut without sequence parallelism"


def _cuts_symbol(shape: tuple[int | str, ...], placement: Placement) -> bool:
    return placement.is_shard and isinstance(shape[placement.dim], str)


def _verify_weights(graph: Graph, nodes: Mapping[str, NodeLayout]) -> None:
    seen: dict[str, str] = {}
    for path, node in graph.nodes.items():
        for key, placement in zip(node.weights, nodes[path].weights, strict=True):
            assert seen.setdefault(key, placement) == placement, f"the weight {key} lies in two ways: {seen[key]}, {placement}"
