"""The context axis: every sequence is cut along its length, every weight is whole with a partial gradient.

Each operation takes the first of its strategies for this axis (`Op.on_context`) that needs the fewest transitions, in the order
of values: what is local to a position needs none, and attention's keys and values are gathered. An operation that offers none
mixes positions in a way that the axis cannot serve, and the axis keeps one rank.

A rank's part of a sequence is two chunks of 2 n, so that causal attention is balanced (Llama 3, arXiv:2407.21783, section
3.3.2); the tensor axis cuts it once more under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from mlmdsl.graph.graph import Graph, Node
from mlmdsl.graph.ops import CATALOGUE
from mlmdsl.graph.ops.base import sequence_dims
from mlmdsl.graph.placement import REPLICATE, Placement, Strategy
from mlmdsl.graph.tensor import symbols_of
from mlmdsl.planner.flow import Flow
from mlmdsl.planner.placement import transition
from mlmdsl.planner.sharding import Infeasible, Move, Sharding


def over_context(sharding: Sharding, context: int, sizes: Mapping[str, int]) -> Sharding | Infeasible:
    """`sharding` with `context` ranks on the context axis; `sizes` of whole sequences by symbol."""
    graph = sharding.graph
    if context == 1:
        return sharding
    cut = sharding.tensor if sharding.sequence_parallel else 1
    refused = _indivisible(graph, context, cut, sizes)
    chosen = strategies(graph, context) if refused is None else refused
    if isinstance(chosen, Infeasible):
        return chosen
    tensor = tuple(replace(move, other=chosen[move.value].output) for move in sharding.moves)
    along = replace(sharding, context=context, context_strategies=chosen, moves=tensor)
    return replace(along, moves=(*tensor, *_gathers(along)))


def strategies(graph: Graph, context: int) -> Mapping[str, Strategy] | Infeasible:
    """By node, in the graph's order."""
    chosen: dict[str, Strategy] = {}
    for path, node in graph.nodes.items():
        offers = [(count, s) for s in _offered(graph, node) if (count := _moves(graph, node, s, chosen)) is not None]
        if not offers:
            name = f"{node.op} at {path}"
            message = f"context = {context} would cut the sequence that {name} needs whole"
            return Infeasible("context", path, message, "pin context = 1, or attend to the other positions")
        chosen[path] = min(offers, key=lambda offer: offer[0])[1]
    return {**chosen, **_whole_inputs(graph, chosen)}


def _whole_inputs(graph: Graph, chosen: Mapping[str, Strategy]) -> Mapping[str, Strategy]:
    """Inputs that nothing wants cut are given whole to every rank."""
    asked: dict[str, set[Placement]] = {}
    for path, node in graph.nodes.items():
        for source, wanted in zip(node.inputs, chosen[path].inputs, strict=True):
            asked.setdefault(source, set()).add(wanted)
    inputs = [path for path, places in asked.items() if graph.nodes[path].op == "input" and places == {REPLICATE}]
    return {path: next(s for s in _offered(graph, graph.nodes[path]) if s.output == REPLICATE) for path in inputs}


def _offered(graph: Graph, node: Node) -> tuple[Strategy, ...]:
    types = tuple(graph.nodes[source].type for source in node.inputs)
    shapes = tuple(graph.weights[key].shape for key in node.weights)
    return CATALOGUE[node.op].on_context(types, node.type, shapes, node.attrs)


def _moves(graph: Graph, node: Node, strategy: Strategy, chosen: Mapping[str, Strategy]) -> int | None:
    """Transitions that the strategy asks for; None where there is no such transition."""
    count = 0
    for source, wanted in zip(node.inputs, strategy.inputs, strict=True):
        left = chosen[source].output
        if left != wanted:
            count += 1
            if transition(left, wanted, integer=graph.nodes[source].type.dtype == "int") is None:
                return None
    return count


def _gathers(sharding: Sharding) -> Iterator[Move]:
    """The transitions on the context axis, in the order of values: after those on the tensor axis, which cuts inside."""
    flow, chosen = Flow(sharding.graph), sharding.context_strategies
    for use in flow.uses:
        source = chosen[flow.nodes[use.producer].path].output
        wanted: dict[tuple[Placement, Placement], list[str]] = {}
        for index, position in use.consumers:
            node = flow.nodes[index]
            target, lies = (_asked(table[node.path], position) for table in (chosen, sharding.strategies))
            wanted.setdefault((target, lies), []).append(node.path)
        for (target, lies), consumers in wanted.items():
            if target != source:
                step = transition(source, target, integer=sharding.graph.nodes[use.value].type.dtype == "int")
                assert step is not None and step.target_dim is None, f"{use.value}: {source} to {target}"
                assert not lies.is_shard or lies.dim != step.dim, f"{use.value} is gathered along what the tensor axis cuts"
                names = tuple(dict.fromkeys(consumers))
                yield Move(use.value, source, target, names, step, use.region, "context", lies)


def _asked(strategy: Strategy, position: int) -> Placement:
    return strategy.output if position < 0 else strategy.inputs[position]


def _indivisible(graph: Graph, context: int, tensor: int, sizes: Mapping[str, int]) -> Infeasible | None:
    for node in graph.nodes.values():
        for symbol in (name for dim in sequence_dims(node.type) for name in sorted(symbols_of(node.type.shape[dim]) - {"B"})):
            length = sizes[symbol]
            if length % (2 * context) or length // context % tensor:
                chunks = f"{2 * context} chunks" + (f", two of which tensor = {tensor} cuts" if tensor > 1 else "")
                message = f"context = {context} cannot cut a sequence of {length} into {chunks}"
                return Infeasible("context", node.path, message, f"take a degree that divides {length // 2}", symbol)
    return None
