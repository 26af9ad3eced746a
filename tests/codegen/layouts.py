"""A layout on the tensor axis in Megatron's manner, chosen node by node: independent of the planner's search."""

from __future__ import annotations

from mlmdsl.graph.graph import Graph, Node, Region
from mlmdsl.graph.ops import CATALOGUE
from mlmdsl.graph.placement import REPLICATE, Placement, Strategy, WeightPlacement, shard
from mlmdsl.planner.plan import CollectiveKind, NodeLayout, RegionLayout, Transition

COLLECTIVES: dict[tuple[str, str], tuple[CollectiveKind | None, CollectiveKind | None]] = {
    ("shard", "broadcast"): ("all_gather", "reduce_scatter"),
    ("shard", "replicate"): ("all_gather", "split"),
    ("replicate", "broadcast"): (None, "all_reduce"),
    ("partial", "replicate"): ("all_reduce", None),
    ("partial", "shard"): ("reduce_scatter", "all_gather"),
    ("partial", "broadcast"): ("all_reduce", "all_reduce"),
    ("replicate", "shard"): ("split", "all_gather"),
}


def layout(graph: Graph, size: int, sequence: bool) -> tuple[RegionLayout, ...]:
    """Weights of matrices are cut wherever they can be; values between blocks lie in `shard(1)` with sequence parallelism."""
    return Megatron(graph, size, shard(1) if sequence else REPLICATE).regions()


class Megatron:
    def __init__(self, graph: Graph, size: int, between: Placement):
        self.graph, self.size, self.between = graph, size, between
        self.outputs: dict[str, Placement] = {}
        self.transitions: dict[tuple[str, str], Transition] = {}
        self.weights: dict[str, WeightPlacement] = {}  # a weight used twice lies the same way both times

    def regions(self) -> tuple[RegionLayout, ...]:
        return tuple(self._region(region) for region in self.graph.regions)

    def _region(self, region: Region) -> RegionLayout:
        self.transitions = {}
        nodes = tuple(self._node(node) for node in region.nodes)
        for carried in region.carried:
            self._ask(carried.next, self.between, carried.entry)
        later = [c for other in self.graph.regions for c in other.carried if other is not region]
        for carried in later:
            if carried.initial in {node.path for node in region.nodes}:
                self._ask(carried.initial, self.between, carried.entry)
        for carried in region.carried:
            self.outputs[carried.next] = self.between
        boundary = {carried.entry: str(self.between) for carried in region.carried}
        return RegionLayout(region=region.name, nodes=nodes, transitions=tuple(self.transitions.values()), boundary=boundary)

    def _node(self, node: Node) -> NodeLayout:
        if node.op in ("input", "carry"):
            self.outputs[node.path] = REPLICATE if node.op == "input" else self.between
            output = str(self.outputs[node.path])
            inputs = () if node.op == "input" else (output,)
            return NodeLayout(path=node.path, strategy="boundary", inputs=inputs, weights=(), output=output)
        chosen = min(self._strategies(node), key=lambda s: self._price(node, s))
        for value, target in zip(node.inputs, chosen.inputs, strict=True):
            self._ask(value, target, node.path)
        self.outputs[node.path] = chosen.output
        self.weights.update(zip(node.weights, chosen.weights, strict=True))
        return NodeLayout(
            path=node.path,
            strategy=chosen.name,
            inputs=tuple(map(str, chosen.inputs)),
            weights=tuple(map(str, chosen.weights)),
            output=str(chosen.output),
        )

    def _strategies(self, node: Node) -> tuple[Strategy, ...]:
        types = tuple(self.graph.nodes[value].type for value in node.inputs)
        shapes = tuple(self.graph.weights[key].shape for key in node.weights)
        found = CATALOGUE[node.op].strategies(types, node.type, shapes, node.attrs, self.size)
        found = (s for s in found if all(self.weights.get(k, w) == w for k, w in zip(node.weights, s.weights, strict=True)))
        return tuple(s for s in found if all(self._legal(v, t) for v, t in zip(node.inputs, s.inputs, strict=True)))

    def _legal(self, value: str, target: Placement) -> bool:
        source = self.outputs[value]
        integer = self.graph.nodes[value].type.dtype == "int"
        if self.between == REPLICATE and target == shard(1) and source != shard(1):
            return False
        return source == target or ((source.kind, target.kind) in COLLECTIVES and not (integer and target.is_shard))

    def _price(self, node: Node, strategy: Strategy) -> tuple[int, ...]:
        """Cut matrices, then few transitions, then what the values between blocks like."""
        matrices = [w for key, w in zip(node.weights, strategy.weights, strict=True) if len(self.graph.weights[key].shape) == 2]
        table = node.op in ("embedding", "position")
        whole = sum(w.dim != 0 if table else w.dim is None for w in matrices) if node.op != "position" else 0
        moves = sum(self.outputs[v] != t for v, t in zip(node.inputs, strategy.inputs, strict=True))
        odd = strategy.name in ("broadcast", "partial", "shared") or (strategy.name == "sequence" and self.between == REPLICATE)
        liked = shard(len(node.type.shape) - 2) if self.between.is_shard and len(node.type.shape) == 2 else self.between
        return (whole, odd, moves, strategy.output != liked)

    def _ask(self, value: str, target: Placement, consumer: str) -> None:
        source = self.outputs[value]
        if source == target:
            return
        forward, backward = COLLECTIVES[source.kind, target.kind]
        known = self.transitions.get((value, str(target)))
        self.transitions[value, str(target)] = Transition(
            value=value,
            source=str(source),
            target=str(target),
            consumers=(*(known.consumers if known else ()), consumer),
            forward=forward,
            backward=backward,
            dim=(source if source.is_shard else target).dim if "shard" in (source.kind, target.kind) else None,
            bytes=32 * 1024,
            reason=f"{consumer} asks for {target}",
        )
