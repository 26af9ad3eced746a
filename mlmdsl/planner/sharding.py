"""One strategy per operation and one set of transitions, of least time on the tensor axis: derived, not written per architecture.

Variables are the nodes of all regions (one pass of a repeat stands for all of them); a value's cost is that of bringing it from how its
producer leaves it to every placement that its consumers ask for, each placement once. The sum over values and nodes is minimised exactly
by variable elimination. Nothing here knows attention or MLPs: Megatron's column and row pairs come out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

from mlmdsl.graph.graph import Carried, Graph, Node, Region
from mlmdsl.graph.ops import CATALOGUE
from mlmdsl.graph.ops.base import Local, Work
from mlmdsl.graph.placement import REPLICATE, Placement, Strategy, WeightPlacement
from mlmdsl.graph.tensor import TensorType
from mlmdsl.planner.communication import Group, collective_seconds
from mlmdsl.planner.compute import Kernels
from mlmdsl.planner.elimination import Factor, eliminate
from mlmdsl.planner.placement import Step, transition
from mlmdsl.planner.plan import NodeLayout, RegionLayout, Transition

# What a local parameter costs once per step, spread over the micro-batches of a typical one: its gradient (fp32) and weight (bf16) cross
# the data axis, weight, gradient and optimizer state pass through memory, and a partial gradient is summed over the tensor axis. It
# decides between cutting a weight and holding it whole; the ledger and the schedule count it exactly.
_MICRO_BATCHES = 4
_DATA_BYTES, _STATE_BYTES, _PARTIAL_BYTES = 6.0, 28.0, 4.0


@dataclass(frozen=True)
class Infeasible:
    """Why the axis cannot have this size: "heads" or "sequence", and the node and sizes that say so."""

    reason: str
    node: str
    message: str
    help: str


@dataclass(frozen=True)
class Move:
    """A transition of one value for all `consumers` that ask for `target`; `region` is the index of the region that makes it."""

    value: str
    source: Placement
    target: Placement
    consumers: tuple[str, ...]
    step: Step
    region: int


@dataclass(frozen=True)
class Sharding:
    """The chosen strategies by node and the moves in order."""

    graph: Graph
    tensor: int
    sequence_parallel: bool
    strategies: Mapping[str, Strategy]
    moves: tuple[Move, ...]

    @cached_property
    def weights(self) -> Mapping[str, WeightPlacement]:
        """Placement of each weight, by folded key; partial where any of its uses leaves a partial gradient."""
        found: dict[str, WeightPlacement] = {}
        for path, node in self.graph.nodes.items():
            for key, placement in zip(node.weights, self.strategies[path].weights, strict=True):
                found[key] = max(found.get(key, placement), placement, key=lambda p: p.partial_gradient)
        return found

    def local_shape(self, type: TensorType, placement: Placement, sizes: Mapping[str, int]) -> tuple[int, ...]:
        shape = type.sizes(sizes)
        if not placement.is_shard:
            return shape
        return tuple(size // self.tensor if dim == placement.dim else size for dim, size in enumerate(shape))

    def local(self, node: Node, sizes: Mapping[str, int], float_bytes: int) -> Local:
        """Sizes of a node on one rank."""
        return local_sizes(self.graph, node, self.strategies[node.path], self.tensor, sizes, float_bytes)

    def work(self, node: Node, sizes: Mapping[str, int], float_bytes: int) -> Work:
        return CATALOGUE[node.op].work(self.local(node, sizes, float_bytes))

    def layouts(self, sizes: Mapping[str, int], float_bytes: int) -> tuple[RegionLayout, ...]:
        """The form that a plan keeps."""
        return tuple(self._layout(index, region, sizes, float_bytes) for index, region in enumerate(self.graph.regions))

    def _layout(self, index: int, region: Region, sizes: Mapping[str, int], float_bytes: int) -> RegionLayout:
        nodes = tuple(_node_layout(node, self.strategies[node.path], self.weights) for node in region.nodes)
        boundary = {c.entry: str(self.strategies[c.entry].output) for c in region.carried}
        moves = tuple(self._transition(move, sizes, float_bytes) for move in self.moves if move.region == index)
        return RegionLayout(region=region.name, nodes=nodes, transitions=moves, boundary=boundary)

    def _transition(self, move: Move, sizes: Mapping[str, int], float_bytes: int) -> Transition:
        return Transition(
            value=move.value,
            source=str(move.source),
            target=str(move.target),
            consumers=move.consumers,
            forward=move.step.forward,
            backward=move.step.backward,
            dim=move.step.dim,
            target_dim=move.step.target_dim,
            bytes=self.move_bytes(move, sizes, float_bytes),
            reason=self._reason(move),
        )

    def move_bytes(self, move: Move, sizes: Mapping[str, int], float_bytes: int) -> int:
        """The larger side of the transition on one rank: the whole value, but for an all_to_all, whose sides are slices."""
        type = self.graph.nodes[move.value].type
        width = {"float": float_bytes, "fp32": 4, "int": 8}[type.dtype]
        whole = type.elements(sizes) * width
        return whole // self.tensor if move.source.is_shard and move.target.is_shard else whole

    def _reason(self, move: Move) -> str:
        """What asks for it: `attn.query, attn.key, attn.value are column-parallel`."""
        carried = {c.entry for region in self.graph.regions for c in region.carried}
        users = [c for c in move.consumers if c not in carried]
        region = self.graph.regions[move.region].name
        short = [user.removeprefix(f"{region}.") for user in users]
        if move.source.kind == "partial":
            maker = move.value.removeprefix(f"{region}.")
            return f"{maker} gives partial sums ({self.strategies[move.value].name})"
        if not users:
            return "the next pass takes it so"
        names = sorted({self.strategies[user].name for user in users})
        return f"{', '.join(short)} {'is' if len(users) == 1 else 'are'} {_WORDS.get(names[0], names[0])}"


_WORDS = {"column": "column-parallel", "row": "row-parallel", "vocabulary": "vocabulary-parallel", "heads": "cut by heads"}


def _node_layout(node: Node, strategy: Strategy, weights: Mapping[str, WeightPlacement]) -> NodeLayout:
    return NodeLayout(
        path=node.path,
        strategy=strategy.name,
        inputs=tuple(map(str, strategy.inputs)),
        weights=tuple(str(weights[key]) for key in node.weights),
        output=str(strategy.output),
    )


def local_sizes(graph: Graph, node: Node, strategy: Strategy, n: int, sizes: Mapping[str, int], float_bytes: int) -> Local:
    def cut(shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
        return shape if dim is None or dim < 0 else tuple(s // n if d == dim else s for d, s in enumerate(shape))

    types = [graph.nodes[source].type for source in node.inputs]
    widths = {"float": float_bytes, "fp32": 4, "int": 8}
    return Local(
        inputs=tuple(cut(t.sizes(sizes), p.dim) for t, p in zip(types, strategy.inputs, strict=True)),
        input_bytes=tuple(widths[t.dtype] for t in types),
        output=cut(node.type.sizes(sizes), strategy.output.dim),
        output_bytes=widths[node.type.dtype],
        weights=tuple(cut(graph.weights[k].shape, w.dim) for k, w in zip(node.weights, strategy.weights, strict=True)),
        weight_bytes=float_bytes,
        attrs=node.attrs,
    )


@dataclass(frozen=True)
class Costs:
    """What the choice is made by: the device, the tensor group's links, a device's share of the links between nodes, bytes of a
    float, sizes of B and S."""

    kernels: Kernels
    group: Group
    data_bytes_per_second: float
    float_bytes: int
    sizes: Mapping[str, int]


def shard_graph(graph: Graph, tensor: int, sequence_parallel: bool, costs: Costs) -> Sharding | Infeasible:
    """The cheapest legal sharding of the whole graph on an axis of `tensor` ranks."""
    problem = _Problem(graph, tensor, sequence_parallel, costs)
    infeasible = problem.infeasible()
    if infeasible is not None:
        return infeasible
    found = eliminate([len(d) for d in problem.domains], list(problem.factors()))
    if found is None:
        return Infeasible("layout", graph.output, f"no sharding over {tensor} ranks is legal", "take a smaller tensor degree")
    chosen = {node.path: problem.domains[i][found[1][i]] for i, node in enumerate(problem.nodes)}
    return Sharding(graph, tensor, sequence_parallel, chosen, tuple(problem.moves(chosen)))


# The axis is there to split products and attention: they are computed redundantly only where nothing else is legal.
_REDUNDANT = ("replicated", "broadcast")


def _spread(strategy: Strategy) -> int:
    """Of equally good strategies the one that leaves least on each rank comes first."""
    return {"shard": 0, "partial": 1, "broadcast": 2, "replicate": 3}[strategy.output.kind]


@dataclass(frozen=True)
class _Use:
    """A value as it is left (`producer`'s output) and what asks for it: (variable, input index; -1 for a carry's boundary)."""

    value: str
    producer: int
    consumers: tuple[tuple[int, int], ...]
    region: int
    passes: int


@dataclass(frozen=True)
class _Problem:
    graph: Graph
    tensor: int
    sequence_parallel: bool
    costs: Costs

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(self.graph.nodes.values())

    @cached_property
    def index(self) -> Mapping[str, int]:
        return {node.path: i for i, node in enumerate(self.nodes)}

    @cached_property
    def domains(self) -> tuple[tuple[Strategy, ...], ...]:
        return tuple(self._domain(node) for node in self.nodes)

    def _domain(self, node: Node) -> tuple[Strategy, ...]:
        types = tuple(self.graph.nodes[source].type for source in node.inputs)
        shapes = tuple(self.graph.weights[key].shape for key in node.weights)
        offered = CATALOGUE[node.op].strategies(types, node.type, shapes, node.attrs, self.tensor)
        legal = tuple(sorted((s for s in offered if self._legal(node, types, s)), key=_spread))
        if not CATALOGUE[node.op].cheap and self.tensor > 1:
            return tuple(s for s in legal if s.name not in _REDUNDANT) or legal
        if node.op != "carry":
            return legal
        cut = tuple(s for s in legal if s.name == "sequence")
        whole = tuple(s for s in legal if s.name == "replicated")
        return cut[:1] if self.sequence_parallel and cut else whole

    def _legal(self, node: Node, types: tuple[TensorType, ...], strategy: Strategy) -> bool:
        """Slices of symbolic dims only under sequence parallelism, and only where they divide."""
        for type, placement in zip((*types, node.type), (*strategy.inputs, strategy.output), strict=True):
            size = type.shape[placement.dim] if placement.is_shard else 1
            if isinstance(size, str) and not (self.sequence_parallel and self.costs.sizes[size] % self.tensor == 0):
                return False
        return True

    def infeasible(self) -> Infeasible | None:
        n = self.tensor
        for node in self.nodes:
            if node.op == "attend" and n > 1 and not any(s.name == "heads" for s in self._domain(node)):
                shape = self.graph.nodes[node.inputs[0]].type.shape, self.graph.nodes[node.inputs[1]].type.shape
                counts = {"heads": shape[0][2], "kv_heads": shape[1][2]}
                name = next(k for k in ("kv_heads", "heads") if isinstance(counts[k], int) and int(counts[k]) % n)
                return Infeasible(
                    "heads", node.path, f"tensor = {n} cannot split {name} = {counts[name]}", f"a divisor of {counts[name]}"
                )
        if self.sequence_parallel and self.costs.sizes.get("S", n) % n:
            size = self.costs.sizes["S"]
            return Infeasible(
                "sequence", self.graph.output, f"tensor = {n} cannot split the sequence of {size}", f"a divisor of {size}"
            )
        return None

    # ---- factors ----------------------------------------------------------------------------------------------------

    def factors(self) -> Iterable[Factor]:
        for i, node in enumerate(self.nodes):
            passes = self.graph.region_of[node.path].count
            yield Factor((i,), {(v,): passes * self._node_seconds(node, s) for v, s in enumerate(self.domains[i])})
        for use in self.uses:
            yield self._value_factor(use)
        yield from self._tied()

    def _node_seconds(self, node: Node, strategy: Strategy) -> float:
        local = local_sizes(self.graph, node, strategy, self.tensor, self.costs.sizes, self.costs.float_bytes)
        op, kernels = CATALOGUE[node.op], self.costs.kernels
        work = op.work(local)
        inner = sum(
            count * collective_seconds(kind, size, self.costs.group) for kind, size, count in op.collectives(strategy, local)
        )
        once = sum(self._weight_seconds(prod(s), w) for s, w in zip(local.weights, strategy.weights, strict=True))
        moved = kernels.memory_seconds(work.bytes_forward + work.bytes_backward)  # breaks ties of what is bound by its launch
        return kernels.forward_seconds(work) + kernels.backward_seconds(work) + inner + once / _MICRO_BATCHES + 0.01 * moved

    def _weight_seconds(self, elements: int, placement: WeightPlacement) -> float:
        summed = (
            collective_seconds("all_reduce", elements * _PARTIAL_BYTES, self.costs.group) if placement.partial_gradient else 0.0
        )
        moved = elements * _DATA_BYTES / self.costs.data_bytes_per_second
        return summed + moved + self.costs.kernels.memory_seconds(elements * _STATE_BYTES)

    @cached_property
    def uses(self) -> tuple[_Use, ...]:
        """Every value with what asks for it. After a repeat the last pass's value lies as the boundary does."""
        inside: dict[str, list[tuple[int, int]]] = {}
        after: dict[str, list[tuple[int, int]]] = {}
        results = {c.next: c for region in self.graph.regions for c in region.carried}
        for node in self.nodes:
            for position, source in enumerate(node.inputs):
                home = self.graph.region_of[source]
                away = source in results and home is not self.graph.region_of[node.path]
                (after if away else inside).setdefault(source, []).append((self.index[node.path], position))
        for carried in (c for region in self.graph.regions for c in region.carried):
            inside.setdefault(carried.next, []).append((self.index[carried.entry], -1))
            first = after if carried.initial in results else inside
            first.setdefault(carried.initial, []).append((self.index[carried.entry], -1))
        uses = [self._use(value, self.index[value], consumers) for value, consumers in inside.items()]
        return tuple(uses + [self._after(results[value], consumers) for value, consumers in after.items()])

    def _use(self, value: str, producer: int, consumers: list[tuple[int, int]]) -> _Use:
        region = self.graph.region_of[value]
        return _Use(value, producer, tuple(consumers), self._number(region), region.count)

    def _after(self, carried: Carried, consumers: list[tuple[int, int]]) -> _Use:
        """Brought where it is wanted once, in the region of its first consumer."""
        regions = [self._number(self.graph.region_of[self.nodes[c].path]) for c, _ in consumers]
        return _Use(carried.next, self.index[carried.entry], tuple(consumers), min(regions), 1)

    def _number(self, region: Region) -> int:
        return next(i for i, r in enumerate(self.graph.regions) if r is region)

    def _demand(self, consumer: tuple[int, int], strategy: Strategy) -> Placement:
        return strategy.output if consumer[1] < 0 else strategy.inputs[consumer[1]]

    def _value_factor(self, use: _Use) -> Factor:
        """Costs by the producer's and the consumers' strategies; combinations that no transition allows are absent."""
        variables = tuple(dict.fromkeys((use.producer, *(c for c, _ in use.consumers))))
        table: dict[tuple[int, ...], float] = {}
        for values in product(*(range(len(self.domains[v])) for v in variables)):
            chosen = dict(zip(variables, values, strict=True))
            source = self.domains[use.producer][chosen[use.producer]].output
            targets = {self._demand(c, self.domains[c[0]][chosen[c[0]]]) for c in use.consumers}
            seconds = self._bring_seconds(use.value, source, frozenset(targets))
            if seconds is not None:
                table[values] = use.passes * seconds
        return Factor(variables, table)

    @cached_property
    def _bring_cache(self) -> dict[tuple[str, Placement, frozenset[Placement]], float | None]:
        return {}

    def _bring_seconds(self, value: str, source: Placement, targets: frozenset[Placement]) -> float | None:
        key = (value, source, targets)
        if key not in self._bring_cache:
            self._bring_cache[key] = self._bring_all(value, source, targets)
        return self._bring_cache[key]

    def _bring_all(self, value: str, source: Placement, targets: Iterable[Placement]) -> float | None:
        """Time of all transitions of a value, forward and backward; None where one is illegal."""
        type, total = self.graph.nodes[value].type, 0.0
        whole = type.elements(self.costs.sizes) * {"float": self.costs.float_bytes, "fp32": 4, "int": 8}[type.dtype]
        for target in sorted(targets):
            if target == source:
                continue
            step = transition(source, target, integer=type.dtype == "int")
            if step is None:
                return None
            size = whole // self.tensor if step.target_dim is not None else whole
            total += collective_seconds(step.forward, size, self.costs.group)
            total += collective_seconds(step.backward, size, self.costs.group)
        return total

    def _tied(self) -> Iterable[Factor]:
        """A weight is cut alike in all its uses."""
        users: dict[str, list[tuple[int, int]]] = {}
        for i, node in enumerate(self.nodes):
            for position, key in enumerate(node.weights):
                users.setdefault(key, []).append((i, position))
        for places in users.values():
            for (one, first), (other, second) in zip(places, places[1:], strict=False):
                pairs = product(enumerate(self.domains[one]), enumerate(self.domains[other]))
                same = {(a, b): 0.0 for (a, s), (b, t) in pairs if s.weights[first].dim == t.weights[second].dim}
                yield Factor((one, other), same)

    # ---- the result -------------------------------------------------------------------------------------------------

    def moves(self, chosen: Mapping[str, Strategy]) -> Iterable[Move]:
        """The transitions that the chosen strategies ask for, in the order of values."""
        for use in self.uses:
            source = chosen[self.nodes[use.producer].path].output
            wanted: dict[Placement, list[str]] = {}
            for consumer in use.consumers:
                path = self.nodes[consumer[0]].path
                wanted.setdefault(self._demand(consumer, chosen[path]), []).append(path)
            for target, consumers in wanted.items():
                if target != source:
                    integer = self.graph.nodes[use.value].type.dtype == "int"
                    step = transition(source, target, integer=integer)
                    assert step is not None, f"{use.value}: {source} to {target}"
                    yield Move(use.value, source, target, tuple(dict.fromkeys(consumers)), step, use.region)


def replicated(graph: Graph) -> Sharding:
    """One rank on the axis: everything whole."""
    return Sharding(graph, 1, False, {path: _whole(node) for path, node in graph.nodes.items()}, ())


def _whole(node: Node) -> Strategy:
    whole = (REPLICATE,) * len(node.inputs)
    return Strategy("replicated", whole, (WeightPlacement(),) * len(node.weights), REPLICATE)
