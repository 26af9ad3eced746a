"""The choice of strategies as a problem of least cost: variables, factors, and the transitions that a choice asks for.

A variable stands for each node (one pass of a repeat stands for all of them), its values are the strategies in which the node
may run. A value of the graph that several operations use gets a variable too: how its producer leaves it, and the set of
placements that it is brought to, each once; its consumers' demands have to be among them. So every factor speaks of two
variables at most, however many operations use a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, combinations, pairwise
from math import inf, prod

from mlmdsl.frozen import frozen
from mlmdsl.graph.graph import Graph, Node
from mlmdsl.graph.ops import CATALOGUE
from mlmdsl.graph.ops.base import Local
from mlmdsl.graph.placement import Placement, Strategy, WeightPlacement
from mlmdsl.graph.tensor import TensorType, size_of
from mlmdsl.planner.communication import Group, collective_seconds
from mlmdsl.planner.compute import Kernels
from mlmdsl.planner.elimination import Factor, eliminate
from mlmdsl.planner.flow import Flow, Use
from mlmdsl.planner.placement import Step, transition

# What a local parameter costs once per step, spread over the micro-batches of a typical one: its gradient (fp32) and weight
# (bf16) cross the data axis; weight, gradient and optimizer state pass through memory; a partial gradient (fp32) is summed over
# the tensor axis. It decides between strategies that are alike in all else; the ledger and the schedule count it exactly.
_MICRO_BATCHES = 4
_DATA_BYTES, _STATE_BYTES, _PARTIAL_BYTES = 6.0, 28.0, 4.0


@frozen
class Costs:
    """What the choice is made by: the device, the tensor group's links, a device's share of the links between nodes, bytes of a
    float, sizes of B and S."""

    kernels: Kernels
    group: Group
    data_bytes_per_second: float
    float_bytes: int
    sizes: Mapping[str, int]

    @cached_property
    def known(self) -> dict[tuple[object, ...], float]:
        """Seconds of nodes and of transitions, which problems over as many ranks have in common."""
        return {}


def width(type: TensorType, float_bytes: int) -> int:
    """Bytes of one element."""
    return {"float": float_bytes, "fp32": 4, "int": 8}[type.dtype]


def cut(shape: tuple[int, ...], dim: int | None, n: int) -> tuple[int, ...]:
    """A shape on one of `n` ranks."""
    return shape if dim is None or dim < 0 else (*shape[:dim], shape[dim] // n, *shape[dim + 1 :])


def cut_around(type: TensorType, placement: Placement, n: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A value's shape on one of `n` ranks of the context axis: its sequence, or the rows of the tokens that the rank has."""
    shape, dim = type.sizes(sizes), placement.dim
    if n == 1 or not placement.is_shard:
        return shape
    own = {symbol: size if symbol == "B" else size // n for symbol, size in sizes.items()}
    return (*shape[:dim], size_of(type.shape[dim], own), *shape[dim + 1 :])


def local_sizes(
    graph: Graph,
    node: Node,
    strategy: Strategy,
    n: int,
    sizes: Mapping[str, int],
    float_bytes: int,
    context: tuple[Strategy, int] | None = None,
    expert: int = 1,
) -> Local:
    """A node's sizes on one of `n` ranks of the tensor axis; `context`: its strategy on the context axis, and that one's
    ranks; `expert`: ranks of the expert axis, each of which has as many rows as without it, of fewer experts."""
    types = [graph.nodes[source].type for source in node.inputs]
    outer, ranks = context or (strategy, 1)

    def local(type: TensorType, placement: Placement, around: Placement) -> tuple[int, ...]:
        return cut(cut_around(type, around, ranks, sizes), placement.dim, n)

    return Local(
        inputs=tuple(map(local, types, strategy.inputs, outer.inputs)),
        input_bytes=tuple(width(t, float_bytes) for t in types),
        output=local(node.type, strategy.output, outer.output),
        output_bytes=width(node.type, float_bytes),
        weights=tuple(
            cut(graph.weights[k].shape_over(expert), w.dim, n) for k, w in zip(node.weights, strategy.weights, strict=True)
        ),
        weight_bytes=float_bytes,
        attrs=node.attrs,
    )


@frozen
class Form:
    """A value as its producer leaves it, and the further placements that it is brought to."""

    source: Placement
    targets: frozenset[Placement]

    def offers(self, demands: Iterable[Placement]) -> bool:
        return all(d == self.source or d in self.targets for d in demands)


@frozen
class Problem:
    graph: Graph
    tensor: int
    sequence_parallel: bool
    costs: Costs

    def solve(self) -> Mapping[str, Strategy] | None:
        """The strategy of each node, of least time in all; None where nothing is legal."""
        sizes = [len(d) for d in self.domains] + [len(self._forms(use)) for use in self._shared]
        if 0 in sizes:
            return None
        found = eliminate(sizes, list(self._factors()))
        if found is None:
            return None
        return {node.path: self.domains[i][found[1][i]] for i, node in enumerate(self.nodes)}

    def seconds(self, chosen: Mapping[str, Strategy]) -> float:
        """What the choice costs: `inf` for one that no transitions or weights can serve."""
        total = sum(self._node_seconds(node, chosen[node.path]) for node in self.nodes)
        for use in self.uses:
            source = chosen[self.nodes[use.producer].path].output
            total += use.passes * self._bring_seconds(use.value, source, frozenset(self.demands(use, chosen)))
        for (one, first), (other, second) in self._ties:
            alike = chosen[self.nodes[one].path].weights[first] == chosen[self.nodes[other].path].weights[second]
            total += 0.0 if alike else inf
        return total

    # ---- nodes and their strategies -------------------------------------------------------------------------------------

    @cached_property
    def flow(self) -> Flow:
        return Flow(self.graph)

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        return self.flow.nodes

    @cached_property
    def index(self) -> Mapping[str, int]:
        return self.flow.index

    @cached_property
    def domains(self) -> tuple[tuple[Strategy, ...], ...]:
        return tuple(map(self.domain, self.nodes))

    def domain(self, node: Node) -> tuple[Strategy, ...]:
        """Its legal strategies."""
        types = tuple(self.graph.nodes[source].type for source in node.inputs)
        shapes = tuple(self.graph.weights[key].shape for key in node.weights)
        offered = CATALOGUE[node.op].strategies(types, node.type, shapes, node.attrs, self.tensor)
        legal = tuple(s for s in offered if self._legal(node, types, s))
        if node.op != "carry":
            return _cutting(legal, shapes)
        cut = tuple(s for s in legal if s.output.is_shard and isinstance(node.type.shape[s.output.dim], str))
        return cut[:1] if self.sequence_parallel and cut else (legal[0],)

    def _legal(self, node: Node, types: tuple[TensorType, ...], strategy: Strategy) -> bool:
        """Slices of symbolic dims only under sequence parallelism, and only where they divide."""
        for type, placement in zip((*types, node.type), (*strategy.inputs, strategy.output), strict=True):
            size = type.shape[placement.dim] if placement.is_shard else 1
            if isinstance(size, str) and not (self.sequence_parallel and self.costs.sizes[size] % self.tensor == 0):
                return False
        return True

    def _node_seconds(self, node: Node, strategy: Strategy) -> float:
        key, known = (self.tensor, node.path, strategy), self.costs.known
        found = known.get(key)
        if found is None:
            passes = self.graph.region_of[node.path].count
            found = known[key] = passes * self._pass_seconds(node, strategy) + self._step_seconds(node, strategy)
        return found

    def _pass_seconds(self, node: Node, strategy: Strategy) -> float:
        """Forward and backward of one micro-batch. The launch of kernels is left out: it is the same for every strategy."""
        local = local_sizes(self.graph, node, strategy, self.tensor, self.costs.sizes, self.costs.float_bytes)
        key, known = (node.op, node.attributes, strategy.name, local.inputs, local.output, local.weights), self.costs.known
        if key not in known:
            op = CATALOGUE[node.op]
            inner = op.collectives(strategy, local)
            called = sum(count * collective_seconds(kind, size, self.costs.group) for kind, size, count in inner)
            known[key] = self.costs.kernels.busy_seconds(op.work(local)) + called
        return known[key]

    def _step_seconds(self, node: Node, strategy: Strategy) -> float:
        """What its weights cost once per step; a weight with several uses shares it among them."""
        total = 0.0
        for key, placement in zip(node.weights, strategy.weights, strict=True):
            weight = self.graph.weights[key]
            share = self.graph.count_of(weight) / (len(self._users[key]) * _MICRO_BATCHES)
            total += share * self._weight_seconds(
                prod(weight.shape) // (1 if placement.dim is None else self.tensor), placement
            )
        return total

    def _weight_seconds(self, elements: int, placement: WeightPlacement) -> float:
        """Partial gradients are summed together at the end of a step: each costs its bytes, none a latency."""
        reduced = elements * _PARTIAL_BYTES if placement.partial_gradient else 0.0
        summed = collective_seconds("all_reduce", reduced, self.costs.group) - self._idle_seconds
        moved = elements * _DATA_BYTES / self.costs.data_bytes_per_second
        return summed + moved + self.costs.kernels.memory_seconds(elements * _STATE_BYTES)

    @cached_property
    def _idle_seconds(self) -> float:
        return collective_seconds("all_reduce", 0, self.costs.group)

    # ---- values and their uses ------------------------------------------------------------------------------------------

    @property
    def uses(self) -> tuple[Use, ...]:
        return self.flow.uses

    def demand(self, consumer: tuple[int, int], strategy: Strategy) -> Placement:
        return strategy.output if consumer[1] < 0 else strategy.inputs[consumer[1]]

    def demands(self, use: Use, chosen: Mapping[str, Strategy]) -> list[Placement]:
        """What each consumer asks for."""
        return [self.demand(c, chosen[self.nodes[c[0]].path]) for c in use.consumers]

    def _bring_seconds(self, value: str, source: Placement, targets: Iterable[Placement]) -> float:
        """Forward and backward time of all transitions of a value in one pass."""
        return sum(self._move_seconds(value, source, target) for target in sorted(targets) if target != source)

    def _move_seconds(self, value: str, source: Placement, target: Placement) -> float:
        type = self.graph.nodes[value].type
        key, known = (self.tensor, type, source, target), self.costs.known
        if key not in known:
            step = transition(source, target, integer=type.dtype == "int")
            size = type.elements(self.costs.sizes) * width(type, self.costs.float_bytes)
            known[key] = inf if step is None else self._step_pair_seconds(step, size)
        return known[key]

    def _step_pair_seconds(self, step: Step, whole_bytes: int) -> float:
        size = step.side_bytes(whole_bytes, self.tensor)
        return sum(collective_seconds(kind, size, self.costs.group) for kind in (step.forward, step.backward))

    # ---- factors --------------------------------------------------------------------------------------------------------

    def _factors(self) -> Iterator[Factor]:
        for i, node in enumerate(self.nodes):
            yield Factor((i,), [self._node_seconds(node, s) for s in self.domains[i]])
        for use in self.uses:
            if len(use.consumers) == 1:
                yield self._single_use(use)
        for variable, use in enumerate(self._shared, len(self.nodes)):
            yield from self._shared_use(use, variable)
        for (one, first), (other, second) in self._ties:
            left, right = ([s.weights[at] for s in self.domains[node]] for node, at in ((one, first), (other, second)))
            yield Factor((one, other), [0.0 if a == b else inf for a in left for b in right])

    @cached_property
    def _shared(self) -> tuple[Use, ...]:
        """Values that several operations use: each has a variable after those of the nodes."""
        return tuple(use for use in self.uses if len(use.consumers) > 1)

    def _single_use(self, use: Use) -> Factor:
        (consumer,) = use.consumers
        wanted = [self.demand(consumer, s) for s in self.domains[consumer[0]]]
        made = [s.output for s in self.domains[use.producer]]
        every = dict.fromkeys(wanted)

        def row(source: Placement) -> list[float]:
            seconds = {t: use.passes * self._move_seconds(use.value, source, t) if t != source else 0.0 for t in every}
            return [seconds[t] for t in wanted]

        each = {source: row(source) for source in dict.fromkeys(made)}
        return Factor((use.producer, consumer[0]), [seconds for source in made for seconds in each[source]])

    def _shared_use(self, use: Use, variable: int) -> Iterator[Factor]:
        forms = self._forms(use)
        yield Factor((variable,), [use.passes * self._bring_seconds(use.value, f.source, f.targets) for f in forms])
        made = self.domains[use.producer]
        yield Factor((use.producer, variable), [0.0 if s.output == f.source else inf for s in made for f in forms])
        for node in dict.fromkeys(node for node, _ in use.consumers):
            asked = [[self.demand(c, s) for c in use.consumers if c[0] == node] for s in self.domains[node]]
            yield Factor((node, variable), [0.0 if f.offers(demands) else inf for demands in asked for f in forms])

    @cached_property
    def _form_cache(self) -> dict[tuple[str, int], tuple[Form, ...]]:
        return {}

    def _forms(self, use: Use) -> tuple[Form, ...]:
        """Every way that the value may be left and every set of placements that it may be brought to, fewest first."""
        key = (use.value, use.region)
        if key not in self._form_cache:
            wanted = sorted({self.demand(c, s) for c in use.consumers for s in self.domains[c[0]]})
            sources = dict.fromkeys(s.output for s in self.domains[use.producer])
            self._form_cache[key] = tuple(form for source in sources for form in self._forms_from(use.value, source, wanted))
        return self._form_cache[key]

    def _forms_from(self, value: str, source: Placement, wanted: Sequence[Placement]) -> Iterator[Form]:
        reachable = [t for t in wanted if t != source and self._move_seconds(value, source, t) < inf]
        for targets in chain.from_iterable(combinations(reachable, count) for count in range(len(reachable) + 1)):
            yield Form(source, frozenset(targets))

    @cached_property
    def _users(self) -> Mapping[str, Sequence[tuple[int, int]]]:
        users: dict[str, list[tuple[int, int]]] = {}
        for i, node in enumerate(self.nodes):
            for position, key in enumerate(node.weights):
                users.setdefault(key, []).append((i, position))
        return users

    @cached_property
    def _ties(self) -> tuple[tuple[tuple[int, int], tuple[int, int]], ...]:
        """Pairs of uses of one weight: it has one placement, and its gradient is whole in all of them or partial in all."""
        return tuple(pair for places in self._users.values() for pair in pairwise(places) if pair[0][0] != pair[1][0])


def _cutting(strategies: tuple[Strategy, ...], shapes: Sequence[tuple[int, ...]]) -> tuple[Strategy, ...]:
    """Matrices whose rows the axis divides are cut, whatever the clock says: an axis that leaves them whole is a data axis
    under another name, which the search tries anyway, and the memory is what it is there for."""
    for index, shape in enumerate(shapes):
        rows = len(shape) - 2  # of a matrix, or of each of a stack of them
        if len(shape) > 1 and any(s.weights[index].dim == rows for s in strategies):
            strategies = tuple(s for s in strategies if s.weights[index].dim is not None)
    return strategies
