"""Re-derives the typing of a plan's layouts: a wrong placement fails here, not as a wrong gradient in training.

Nothing of the search is used but the catalogue of operations and the table of transitions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from mlmdsl.frozen import frozen
from mlmdsl.graph.graph import Carried, Graph, Node
from mlmdsl.graph.ops import CATALOGUE
from mlmdsl.graph.placement import (
    PARTIAL,
    REPLICATE,
    WHOLE_PARTIAL,
    Placement,
    Strategy,
    parse_placement,
    parse_weight_placement,
)
from mlmdsl.graph.tensor import TensorType, symbols_of
from mlmdsl.planner.placement import transition
from mlmdsl.planner.plan import NodeLayout, Plan, RegionLayout, Transition

_WIDTHS = {"fp32": 4, "bf16": 2}


def verify_layout(graph: Graph, plan: Plan) -> None:
    """The layouts of a plan on both axes; one for a single rank has nothing to verify."""
    v, width = plan.plan, _WIDTHS[plan.precision]
    sizes = graph.sizes(v.micro_batch, plan.seq_len)
    if v.tensor > 1:
        around = Around(v.context, plan.context_layout, source=True) if v.context > 1 else None
        verify_regions(graph, plan.layout, v.tensor, v.sequence_parallel, sizes, width, around)
    if v.context > 1:
        around = Around(v.tensor, plan.layout, source=False)
        _verify(_Context(graph, plan.context_layout, v.context, True, sizes, width, around))


@frozen
class Around:
    """The other axis, as far as it divides bytes. Values move on the tensor axis as their producers left them on the context
    axis (`source`), and then on the context axis as their consumers want them on the tensor axis."""

    ranks: int
    layouts: Sequence[RegionLayout]
    source: bool

    @cached_property
    def _nodes(self) -> Mapping[str, NodeLayout]:
        return {node.path: node for layout in self.layouts for node in layout.nodes}

    def divisor(self, graph: Graph, item: Transition) -> int:
        if self.ranks == 1:
            return 1
        lies = {self._nodes[item.value].output} if self.source else {self._lie(graph, item.value, c) for c in item.consumers}
        assert len(lies) == 1, f"{item.value}: moved for consumers that want it in several ways on the other axis: {lies}"
        place = parse_placement(lies.pop())
        assert self.source or not place.is_shard or place.dim != item.dim, f"{item.value}: gathered around a cut of its dim"
        return self.ranks if place.is_shard else 1

    def _lie(self, graph: Graph, value: str, consumer: str) -> str:
        inputs, layout = graph.nodes[consumer].inputs, self._nodes[consumer]
        return layout.inputs[inputs.index(value)] if value in inputs else layout.output


def verify_regions(
    graph: Graph,
    layouts: Sequence[RegionLayout],
    tensor: int,
    sequence_parallel: bool,
    sizes: Mapping[str, int],
    float_bytes: int,
    around: Around | None = None,
) -> None:
    """Every node's strategy is one that its operation offers; every value reaches each consumer in the placement that it asks
    for, by one legal transition or by none, listed where the program makes it and of the right bytes; tied weights lie alike;
    the loss is whole; no sequence is cut without sequence parallelism. AssertionError says where not."""
    _verify(_Checker(graph, layouts, tensor, sequence_parallel, sizes, float_bytes, around))


def _verify(checker: _Checker) -> None:
    layouts, graph = checker.layouts, checker.graph
    assert [r.region for r in layouts] == [r.name for r in graph.regions], "the layout has other regions than the graph"
    for layout, region in zip(layouts, graph.regions, strict=True):
        assert [n.path for n in layout.nodes] == [n.path for n in region.nodes], f"{region.name}: other nodes than the graph"
    checker.strategies()
    checker.boundaries()
    checker.transitions()
    checker.weights()


@frozen
class _Checker:
    graph: Graph
    layouts: Sequence[RegionLayout]
    ranks: int
    sequence_parallel: bool
    sizes: Mapping[str, int]
    float_bytes: int
    around: Around | None = None

    @property
    def loss(self) -> Placement:
        return REPLICATE

    def offered(self, node: Node, types: tuple[TensorType, ...], shapes: tuple[tuple[int, ...], ...]) -> Sequence[Strategy]:
        return CATALOGUE[node.op].strategies(types, node.type, shapes, node.attrs, self.ranks)

    def nodes(self) -> Iterator[tuple[Node, NodeLayout]]:
        for layout in self.layouts:
            for item in layout.nodes:
                yield self.graph.nodes[item.path], item

    def strategies(self) -> None:
        for node, layout in self.nodes():
            types = tuple(self.graph.nodes[source].type for source in node.inputs)
            shapes = tuple(self.graph.weights[key].shape for key in node.weights)
            inputs, output = tuple(map(parse_placement, layout.inputs)), parse_placement(layout.output)
            chosen = Strategy(layout.strategy, inputs, tuple(map(parse_weight_placement, layout.weights)), output)
            assert chosen in self.offered(node, types, shapes), f"{node.path}: {node.op} offers no strategy {layout}"
            assert node.path != self.graph.loss or output == self.loss, f"{node.path}: the loss is {output}, not {self.loss}"
            for type, placement in zip((*types, node.type), (*inputs, output), strict=True):
                self._verify_slice(node.path, type, placement)

    def _verify_slice(self, path: str, type: TensorType, placement: Placement) -> None:
        size = type.shape[placement.dim] if placement.is_shard else self.ranks
        assert isinstance(size, int) or self.sequence_parallel, f"{path}: the sequence is cut without sequence parallelism"
        for count in (size,) if isinstance(size, int) else (self.sizes[symbol] for symbol in symbols_of(size) - {"B"}):
            assert count % self.ranks == 0, f"{path}: {self.ranks} ranks cannot cut {count}"

    def boundaries(self) -> None:
        for layout, region in zip(self.layouts, self.graph.regions, strict=True):
            outputs = {node.path: node.output for node in layout.nodes}
            wanted = {c.entry: outputs[c.entry] for c in region.carried}
            assert layout.boundary == wanted, f"{region.name}: the boundary {layout.boundary} is not {wanted}"

    def transitions(self) -> None:
        """Everything that is asked for is brought, and nothing else is."""
        listed: dict[tuple[str, str, str, int], Transition] = {}
        for region, layout in enumerate(self.layouts):
            for item in layout.transitions:
                assert item.consumers, f"{item.value}: a transition for nobody"
                for consumer in item.consumers:
                    key = (item.value, item.target, consumer, region)
                    assert key not in listed, f"{item.value}: brought to {item.target} twice for {consumer}"
                    listed[key] = item
        used = {key for use in self._uses() if (key := self._verify_use(listed, *use)) is not None}
        assert used == set(listed), f"transitions that nothing asks for: {sorted(set(listed) - used)}"

    def _uses(self) -> Iterator[tuple[str, str, str, int]]:
        """(value, placement asked for, consumer, the consumer's region)."""
        for number, (layout, region) in enumerate(zip(self.layouts, self.graph.regions, strict=True)):
            for item, node in zip(layout.nodes, region.nodes, strict=True):
                for source, wanted in zip(node.inputs, item.inputs, strict=True):
                    yield source, wanted, node.path, number
            for carried in region.carried:
                yield carried.initial, layout.boundary[carried.entry], carried.entry, number
                yield carried.next, layout.boundary[carried.entry], carried.entry, number

    def _verify_use(
        self, listed: Mapping[tuple[str, str, str, int], Transition], value: str, wanted: str, consumer: str, region: int
    ) -> tuple[str, str, str, int] | None:
        """The key of the transition used; None where the value already lies as wanted."""
        left, home = self._found(value, region)
        if left == wanted:
            return None
        key = (value, wanted, consumer, home)
        assert key in listed, f"{value} lies as {left}, {consumer} wants {wanted}, and nothing brings it there"
        self._verify_transition(listed[key], left)
        return key

    def _found(self, value: str, region: int) -> tuple[str, int]:
        """How a value lies where `region` finds it, and the region that has to bring it elsewhere: the one that makes it; for
        the result of a repeat, which lies as the boundary does, the one that uses it."""
        home = next(i for i, r in enumerate(self.graph.regions) if r is self.graph.region_of[value])
        result = _result(self.graph.regions[home].carried, value)
        if home != region and result is not None:
            return self.layouts[home].boundary[result.entry], region
        return next(node.output for node in self.layouts[home].nodes if node.path == value), home

    def _verify_transition(self, item: Transition, left: str) -> None:
        type, name = self.graph.nodes[item.value].type, f"{item.value}: {item.source} to {item.target}"
        assert item.source == left, f"{name}: the value lies as {left}"
        step = transition(parse_placement(item.source), parse_placement(item.target), integer=type.dtype == "int")
        assert step is not None, f"{name}: there is no such transition"
        wanted = (step.forward, step.backward, step.dim, step.target_dim)
        listed = (item.forward, item.backward, item.dim, item.target_dim)
        assert listed == wanted, f"{name}: {listed} instead of {wanted}"
        width = {"float": self.float_bytes, "fp32": 4, "int": 8}[type.dtype]
        divisor = self.around.divisor(self.graph, item) if self.around is not None else 1
        size = step.side_bytes(type.elements(self.sizes) * width // divisor, self.ranks)
        assert item.bytes == size, f"{name}: {item.bytes} bytes instead of {size}"

    def weights(self) -> None:
        seen: dict[str, str] = {}
        for node, layout in self.nodes():
            for key, placement in zip(node.weights, layout.weights, strict=True):
                assert seen.setdefault(key, placement) == placement, (
                    f"the weight {key} lies in two ways: {seen[key]}, {placement}"
                )


class _Context(_Checker):
    """Every sequence is cut or gathered, weights are whole with partial gradients, and the loss is a partial sum."""

    @property
    def loss(self) -> Placement:
        return PARTIAL

    def offered(self, node: Node, types: tuple[TensorType, ...], shapes: tuple[tuple[int, ...], ...]) -> Sequence[Strategy]:
        found = CATALOGUE[node.op].on_context(types, node.type, shapes, node.attrs)
        return [s for s in found if all(weight == WHOLE_PARTIAL for weight in s.weights)]


def _result(carried: Sequence[Carried], value: str) -> Carried | None:
    return next((c for c in carried if c.next == value), None)
