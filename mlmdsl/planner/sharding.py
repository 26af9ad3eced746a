"""One strategy per operation and one set of transitions, of least time on the tensor axis: derived, not written per
architecture.

`choice.py` states the problem and solves it exactly; here stands the result. Nothing knows attention or MLPs: Megatron's column
and row pairs (arXiv:1909.08053) and its sequence parallelism (arXiv:2205.05198) come out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from functools import cached_property
from typing import Literal

from mlmdsl.frozen import frozen
from mlmdsl.graph.graph import Graph, Node
from mlmdsl.graph.ops.base import Local
from mlmdsl.graph.placement import REPLICATE, WHOLE, Placement, Strategy, WeightPlacement
from mlmdsl.graph.tensor import TensorType, symbols_of
from mlmdsl.planner.choice import Costs, Problem, cut, cut_around, local_sizes, width
from mlmdsl.planner.placement import Step, transition
from mlmdsl.planner.plan import NodeLayout, RegionLayout, Transition

__all__ = ["Costs", "Infeasible", "Move", "Sharding", "local_sizes", "reference_micro_batch", "replicated", "shard_graph"]

_REFERENCE_TOKENS = 8192

Lie = tuple[Placement, Placement]  # of a value on the tensor and the context axis, whose cut is the outer one


@frozen
class Infeasible:
    """Why the axis cannot have this size: "heads" or "sequence", the node that says so, and which of its settings ("heads",
    "kv_heads", or the symbol of a dim)."""

    reason: str
    node: str
    message: str
    help: str
    attribute: str = ""


@frozen
class Move:
    """A transition of one value for all `consumers` that ask for `target`; `region` is the index of the region that makes
    it."""

    value: str
    source: Placement
    target: Placement
    consumers: tuple[str, ...]
    step: Step
    region: int
    axis: Literal["tensor", "context"] = "tensor"
    other: Placement = REPLICATE  # how the value lies on the other axis meanwhile

    @property
    def lie(self) -> Lie:
        """How the value lies afterwards."""
        return (self.target, self.other) if self.axis == "tensor" else (self.other, self.target)


@frozen
class Sharding:
    """The chosen strategies by node and the moves in order, those of the tensor axis first: the same for every micro-batch,
    whose sizes the methods are given."""

    graph: Graph
    tensor: int
    sequence_parallel: bool
    strategies: Mapping[str, Strategy]
    moves: tuple[Move, ...]
    context: int = 1
    context_strategies: Mapping[str, Strategy] = field(default_factory=dict[str, Strategy])
    expert: int = 1

    def left(self, path: str) -> Lie:
        """How a node leaves its value on the tensor and the context axis."""
        around = self.context_strategies.get(path)
        return self.strategies[path].output, REPLICATE if around is None else around.output

    def asked(self, node: Node, position: int) -> Lie:
        """How a node wants an input."""
        around = self.context_strategies.get(node.path)
        return self.strategies[node.path].inputs[position], REPLICATE if around is None else around.inputs[position]

    @cached_property
    def weights(self) -> Mapping[str, WeightPlacement]:
        """Placement of each weight, by folded key, alike in all its uses."""
        return {
            key: placement
            for path, node in self.graph.nodes.items()
            for key, placement in zip(node.weights, self.strategies[path].weights, strict=True)
        }

    def local(self, node: Node, sizes: Mapping[str, int], float_bytes: int) -> Local:
        """Sizes of a node on one rank."""
        around = (self.context_strategies[node.path], self.context) if self.context > 1 else None
        return local_sizes(self.graph, node, self.strategies[node.path], self.tensor, sizes, float_bytes, around, self.expert)

    def local_shape(self, type: TensorType, lie: Lie, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """A value on one rank."""
        return cut(cut_around(type, lie[1], self.context, sizes), lie[0].dim, self.tensor)

    def local_elements(self, key: str) -> int:
        """Elements of a weight on one rank."""
        elements = self.graph.weights[key].elements
        return elements if self.weights[key].dim is None else elements // self.tensor

    def move_bytes(self, move: Move, sizes: Mapping[str, int], float_bytes: int) -> int:
        """The larger side of the transition on one rank."""
        type = self.graph.nodes[move.value].type
        inner, outer = (self.tensor, self.context) if move.axis == "tensor" else (self.context, self.tensor)
        whole = type.elements(sizes) * width(type, float_bytes) // (outer if move.other.is_shard else 1)
        return move.step.side_bytes(whole, inner)

    def layouts(self, sizes: Mapping[str, int], float_bytes: int) -> tuple[RegionLayout, ...]:
        """The form that a plan keeps, of the tensor axis."""
        return tuple(self._layout(i, self.strategies, "tensor", sizes, float_bytes) for i in range(len(self.graph.regions)))

    def context_layouts(self, sizes: Mapping[str, int], float_bytes: int) -> tuple[RegionLayout, ...]:
        """The same of the context axis; nothing where it has one rank."""
        regions = range(len(self.graph.regions) if self.context > 1 else 0)
        return tuple(self._layout(i, self.context_strategies, "context", sizes, float_bytes) for i in regions)

    def _layout(
        self, index: int, chosen: Mapping[str, Strategy], axis: str, sizes: Mapping[str, int], float_bytes: int
    ) -> RegionLayout:
        region = self.graph.regions[index]
        moves = (m for m in self.moves if m.region == index and m.axis == axis)
        return RegionLayout(
            region=region.name,
            nodes=tuple(_node_layout(node, chosen[node.path]) for node in region.nodes),
            transitions=tuple(self._transition(m, sizes, float_bytes) for m in moves),
            boundary={c.entry: str(chosen[c.entry].output) for c in region.carried},
        )

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
            reason=self.reason(move),
        )

    def reason(self, move: Move) -> str:
        """What asks for it: `attn.query, attn.key, attn.value are column-parallel`."""
        carried = {c.entry for region in self.graph.regions for c in region.carried}
        users = [c for c in move.consumers if c not in carried]
        region = self.graph.regions[move.region].name
        short = [user.removeprefix(f"{region}.") for user in users]
        if move.axis == "context":
            return f"{', '.join(short)} {'sees' if len(users) == 1 else 'see'} the whole sequence"
        if move.source.kind == "partial":
            maker = move.value.removeprefix(f"{region}.")
            name = self.strategies[move.value].name
            return f"{maker} is {_WORDS.get(name, name)}"
        if not users:
            repeat = self.graph.region_of[move.consumers[0]].name
            return f"{repeat} carries it {_CARRIED[move.target.kind == 'shard']}"
        names = list(dict.fromkeys(_WORDS.get(self.strategies[u].name, self.strategies[u].name) for u in users))
        return f"{', '.join(short)} {'is' if len(users) == 1 else 'are'} {' and '.join(names)}"


_WORDS = {
    "column": "column-parallel",
    "row": "row-parallel",
    "vocabulary": "vocabulary-parallel",
    "heads": "cut by heads",
    "sequence": "cut along the sequence",
    "hidden": "cut along the hidden dim",
    "sharded": "cut",
    "partial": "a partial sum",
    "broadcast": "whole on every rank",
    "replicated": "whole on every rank",
}
_CARRIED = {True: "cut along the sequence", False: "whole"}


def _node_layout(node: Node, strategy: Strategy) -> NodeLayout:
    return NodeLayout(
        path=node.path,
        strategy=strategy.name,
        inputs=tuple(map(str, strategy.inputs)),
        weights=tuple(map(str, strategy.weights)),
        output=str(strategy.output),
    )


def reference_micro_batch(seq_len: int) -> int:
    """Sequences of the micro-batch to choose at: times grow with the micro-batch nearly in proportion, so that one choice
    serves all; what does not (latencies, sums of weight gradients) is weighed at 8192 tokens."""
    return max(1, _REFERENCE_TOKENS // seq_len)


def shard_graph(graph: Graph, tensor: int, sequence_parallel: bool, costs: Costs) -> Sharding | Infeasible:
    """The cheapest legal sharding of the whole graph on an axis of `tensor` ranks.

    With sequence parallelism the values between blocks (the carried ones) are cut along the sequence, without it they are whole
    and no sequence is cut anywhere."""
    if tensor == 1:
        return replicated(graph)
    problem = Problem(graph, tensor, sequence_parallel, costs)
    refused = _indivisible_heads(problem) or (_indivisible_sequence(problem) if sequence_parallel else None)
    if refused is not None:
        return refused
    chosen = problem.solve()
    if chosen is None:
        return Infeasible("layout", graph.output, f"no sharding over {tensor} ranks is legal", "take a smaller tensor degree")
    return Sharding(graph, tensor, sequence_parallel, chosen, tuple(_moves(problem, chosen)))


def replicated(graph: Graph) -> Sharding:
    """One rank on the axis: everything whole."""
    return Sharding(graph, 1, False, {path: _whole(node) for path, node in graph.nodes.items()}, ())


def _whole(node: Node) -> Strategy:
    return Strategy("replicated", (REPLICATE,) * len(node.inputs), (WHOLE,) * len(node.weights), REPLICATE)


def _moves(problem: Problem, chosen: Mapping[str, Strategy]) -> Iterator[Move]:
    """The transitions that the chosen strategies ask for, in the order of values."""
    for use in problem.uses:
        source = chosen[problem.nodes[use.producer].path].output
        wanted: dict[Placement, list[str]] = {}
        for (node, _), target in zip(use.consumers, problem.demands(use, chosen), strict=True):
            wanted.setdefault(target, []).append(problem.nodes[node].path)
        for target, consumers in wanted.items():
            if target != source:
                step = transition(source, target, integer=problem.graph.nodes[use.value].type.dtype == "int")
                assert step is not None, f"{use.value}: {source} to {target}"
                yield Move(use.value, source, target, tuple(dict.fromkeys(consumers)), step, use.region)


def _indivisible_heads(problem: Problem) -> Infeasible | None:
    """Attention that cannot be cut by heads would be computed by every rank: refused rather than paid in silence."""
    n = problem.tensor
    for node in problem.nodes:
        if node.op == "attend" and not any(s.name == "heads" for s in problem.domain(node)):
            query, key = (problem.graph.nodes[source].type.shape[2] for source in node.inputs[:2])
            for name, count in (("heads", query), ("kv_heads", key)):
                if isinstance(count, int) and count % n:
                    message = f"tensor = {n} cannot split {name} = {count}"
                    return Infeasible("heads", node.path, message, f"take a tensor degree that divides {count}", name)
    return None


def _indivisible_sequence(problem: Problem) -> Infeasible | None:
    n, sizes = problem.tensor, problem.costs.sizes
    for node in problem.nodes:
        for dim in node.type.shape:
            if isinstance(dim, str) and "B" not in symbols_of(dim) and sizes[dim] % n:
                message = f"tensor = {n} cannot split a sequence of {sizes[dim]}"
                return Infeasible("sequence", node.path, message, f"take a tensor degree that divides {sizes[dim]}", dim)
    return None
