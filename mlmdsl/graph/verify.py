"""Invariants of a finished graph, asserted before planning: a compiler's bug must fail here, not in training."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

from mlmdsl.graph.graph import Graph, Region
from mlmdsl.graph.ops import CATALOGUE


def verify(graph: Graph) -> None:
    """Paths are unique, values are made before they are used, types follow the catalogue, every weight is used, carried
    values keep their types, and one pass of everything is acyclic."""
    paths = [node.path for region in graph.regions for node in region.nodes]
    assert len(paths) == len(set(paths)), "a path is used twice"
    assert graph.output in graph.nodes and graph.loss in graph.nodes, "output or loss is no node"
    names = [region.name for region in graph.regions if region.repeated]
    assert len(names) == len(set(names)), "two repeats have one name"
    made: set[str] = set()
    for region in graph.regions:
        _verify_region(graph, region, made)
    used = {key for node in graph.nodes.values() for key in node.weights}
    assert used == set(graph.weights), f"weights {used ^ set(graph.weights)} are unused or unknown"
    assert _is_acyclic(graph), "the graph has a cycle"


def _is_acyclic(graph: Graph) -> bool:
    """An edge per use; a repeat is one pass of its body."""
    sources = {path: set(node.inputs) for path, node in graph.nodes.items()}
    for carried in (c for region in graph.regions for c in region.carried):
        sources[carried.entry].add(carried.initial)
    try:
        TopologicalSorter(sources).prepare()
    except CycleError:
        return False
    return True


def _verify_region(graph: Graph, region: Region, made: set[str]) -> None:
    inside = {node.path for node in region.nodes}
    entries = {carried.entry for carried in region.carried}
    for carried in region.carried:
        assert carried.initial in made, f"{carried.initial} is carried into {region.name} before it is made"
        assert carried.next in inside, f"{carried.next} is not made in {region.name}"
        types = {graph.nodes[path].type for path in (carried.initial, carried.entry, carried.next)}
        assert len(types) == 1, f"{carried.variable} changes its type in {region.name}"
    for node in region.nodes:
        assert (node.op == "carry") == (node.path in entries), f"{node.path} is carried by nothing"
        for source in node.inputs:
            assert source in made, f"{node.path} uses {source} before it is made"
        if node.op not in ("input", "carry"):
            types = tuple(graph.nodes[source].type for source in node.inputs)
            assert CATALOGUE[node.op].infer(types, node.attrs) == node.type, (
                f"{node.path} has another type than its operation gives"
            )
        made.add(node.path)
