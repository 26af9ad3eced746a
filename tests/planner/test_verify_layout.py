"""A layout in which anything is changed does not pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from mlmdsl.graph.graph import Graph
from mlmdsl.planner.plan import RegionLayout
from mlmdsl.planner.sharding import Sharding, shard_graph
from mlmdsl.planner.verify_layout import verify_regions
from tests.planner.models import GPT, costs_of, graph_of

SIZES = {"B": 4, "S": 2048}


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(GPT)


def layouts_of(graph: Graph, sequence: bool) -> tuple[RegionLayout, ...]:
    found = shard_graph(graph, 4, sequence, costs_of(4, SIZES))
    assert isinstance(found, Sharding)
    return found.layouts(SIZES, 2)


def verify(graph: Graph, layouts: Sequence[RegionLayout], sequence: bool = True) -> None:
    verify_regions(graph, layouts, 4, sequence, SIZES, 2)


def with_transition(layouts: Sequence[RegionLayout], region: int, index: int, **changes: Any) -> list[RegionLayout]:
    changed = list(layouts)
    items = list(layouts[region].transitions)
    items[index] = replace(items[index], **changes)
    changed[region] = replace(layouts[region], transitions=tuple(items))
    return changed


CORRUPTIONS = {
    "value": "blocks.attention.q",
    "source": "shard(0)",
    "target": "broadcast+",
    "consumers": ("blocks.add",),
    "forward": "recv",
    "backward": "send",
    "dim": 7,
    "target_dim": 7,
    "bytes": 1,
}


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("field", CORRUPTIONS)
def test_any_corrupted_transition_is_found(graph: Graph, field: str, sequence: bool) -> None:
    layouts = layouts_of(graph, sequence)
    verify(graph, layouts, sequence)
    for region, layout in enumerate(layouts):
        for index in range(len(layout.transitions)):
            with pytest.raises(AssertionError):
                verify(graph, with_transition(layouts, region, index, **{field: CORRUPTIONS[field]}), sequence)


def test_a_missing_a_doubled_and_a_misplaced_transition_are_found(graph: Graph) -> None:
    layouts = layouts_of(graph, True)
    for region, layout in enumerate(layouts):
        for item in layout.transitions:
            without = tuple(t for t in layout.transitions if t is not item)
            changed = list(layouts)
            changed[region] = replace(layout, transitions=without)
            with pytest.raises(AssertionError, match="nothing brings it there"):
                verify(graph, changed)
            other = (region + 1) % len(layouts)
            moved = replace(layouts[other], transitions=(*layouts[other].transitions, item))
            changed[other] = moved
            with pytest.raises(AssertionError):
                verify(graph, changed)
            changed[other] = layouts[other]
            changed[region] = replace(layout, transitions=(*layout.transitions, item))
            with pytest.raises(AssertionError, match="twice"):
                verify(graph, changed)


@pytest.mark.parametrize("field", ["strategy", "inputs", "weights", "output"])
def test_a_node_changed_in_any_way_is_found(graph: Graph, field: str) -> None:
    layouts = layouts_of(graph, True)
    for region, layout in enumerate(layouts):
        for index, node in enumerate(layout.nodes):
            values = {
                "strategy": "magic",
                "inputs": tuple("partial" for _ in node.inputs) or ("partial",),
                "weights": tuple("shard(0)+partial_grad" for _ in node.weights) or ("replicate",),
                "output": "broadcast",
            }
            nodes = list(layout.nodes)
            nodes[index] = replace(node, **{field: values[field]})
            changed = list(layouts)
            changed[region] = replace(layout, nodes=tuple(nodes))
            with pytest.raises(AssertionError):
                verify(graph, changed)


def test_tied_weights_that_disagree_are_found(graph: Graph) -> None:
    """The head in column, the embedding along its hidden dim: each legal, together not."""
    layouts = layouts_of(graph, True)
    nodes = list(layouts[0].nodes)
    index = next(i for i, node in enumerate(nodes) if node.path == "tok")
    nodes[index] = replace(nodes[index], strategy="hidden", weights=("shard(1)",), output="shard(2)")
    moves = tuple(
        replace(t, source="shard(2)", forward="all_to_all", backward="all_to_all", dim=2, target_dim=1, bytes=t.bytes // 4)
        if t.value == "tok" else t
        for t in layouts[0].transitions
    )  # fmt: skip
    changed = [replace(layouts[0], nodes=tuple(nodes), transitions=moves), *layouts[1:]]
    with pytest.raises(AssertionError, match=r"tok\.weight lies in two ways"):
        verify(graph, changed)


def test_a_sequence_cut_without_sequence_parallelism_is_found(graph: Graph) -> None:
    with pytest.raises(AssertionError, match="without sequence parallelism"):
        verify(graph, layouts_of(graph, True), sequence=False)
