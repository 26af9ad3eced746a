"""Whether two models compute the same, whatever their names: two graphs walked together from the output back to the inputs.

Order of the operands of sums and products does not matter. `loosely` compares operations and wiring alone, so that sizes can be
read off; otherwise settings and shapes have to agree too.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mlmdsl.graph.graph import Carried, Graph, Node
from mlmdsl.huggingface.expressions import literal

_COMMUTING = ("add", "multiply")


@dataclass
class Difference(Exception):
    """Where the two part: `message` says how, `node` is the other model's, `distance` how many nodes agreed before it."""

    message: str
    node: Node | None
    distance: int = 0


@dataclass
class Match:
    """What corresponds: nodes and weights (folded keys) of the reference to those of the other model."""

    nodes: dict[str, str] = field(default_factory=dict[str, str])
    weights: dict[str, str] = field(default_factory=dict[str, str])
    regions: dict[str, str] = field(default_factory=dict[str, str])


def match(reference: Graph, other: Graph, *, loosely: bool = False) -> Match:
    """Raises Difference."""
    walk = _Walk(reference, other, loosely)
    with _deep():
        walk.same(reference.output, other.output)
    return walk.found


class _Walk:
    def __init__(self, reference: Graph, other: Graph, loosely: bool):
        self.reference, self.other, self.loosely = reference, other, loosely
        self.found = Match()
        self.carried = tuple({c.entry: c for region in graph.regions for c in region.carried} for graph in (reference, other))

    def same(self, a: str, b: str) -> None:
        if a in self.found.nodes:
            if self.found.nodes[a] != b:
                self._differ(f"takes another value than {self.found.nodes[a]}", b)
            return
        one, two = self.reference.nodes[a], self.other.nodes[b]
        if one.op != two.op or len(one.inputs) != len(two.inputs):
            self._differ(f"is `{two.op}` where the family's model has `{one.op}` ({a})", b)
        self.found.nodes[a] = b
        self._regions(a, b)
        self._weights(one, two)
        if not self.loosely:
            self._settings(one, two)
        if one.op == "carry":
            self._carry(self.carried[0][a], self.carried[1][b])
        else:
            self._inputs(one, two)

    def _regions(self, a: str, b: str) -> None:
        one, two = self.reference.region_of[a], self.other.region_of[b]
        if one.repeated != two.repeated or self.found.regions.setdefault(one.name, two.name) != two.name:
            self._differ("stands in another repeat than in the family's model", b)
        if not self.loosely and one.count != two.count:
            self._differ(f"stands in a repeat of {two.count} instead of {one.count}", b)

    def _weights(self, one: Node, two: Node) -> None:
        if len(one.weights) != len(two.weights):
            self._differ("has other weights than in the family's model", two.path)
        for key, theirs in zip(one.weights, two.weights, strict=True):
            if self.found.weights.setdefault(key, theirs) != theirs:
                self._differ(f"uses {theirs}, not the weight that it shares in the family's model", two.path)
            shape, expected = self.other.weights[theirs].shape, self.reference.weights[key].shape
            if not self.loosely and shape != expected:
                self._differ(f"has the weight {theirs} of shape {list(shape)} instead of {list(expected)}", two.path)
        backwards = {theirs: key for key, theirs in self.found.weights.items()}
        if len(backwards) != len(self.found.weights):
            self._differ("shares a weight that the family's model does not share", two.path)

    def _settings(self, one: Node, two: Node) -> None:
        for name in sorted({*one.attrs, *two.attrs}):
            expected, found = one.attrs.get(name), two.attrs.get(name)
            if expected != found:
                self._differ(f"has {name} = {literal(found)} instead of {literal(expected)}", two.path)

    def _carry(self, one: Carried, two: Carried) -> None:
        self.same(one.next, two.next)
        self.same(one.initial, two.initial)

    def _inputs(self, one: Node, two: Node) -> None:
        if one.op in _COMMUTING:
            self._operands(self._flat(self.reference, one), self._flat(self.other, two), two)
            return
        for a, b in zip(one.inputs, two.inputs, strict=True):
            self.same(a, b)

    def _flat(self, graph: Graph, node: Node) -> list[str]:
        """The operands of a sum of sums, or a product of products."""
        found: list[str] = []
        for path in node.inputs:
            inner = graph.nodes[path]
            nested = inner.op == node.op and graph.region_of[path] is graph.region_of[node.path]
            found += self._flat(graph, inner) if nested else [path]
        return found

    def _operands(self, ones: list[str], twos: list[str], node: Node) -> None:
        """The same operands in any order."""
        if len(ones) != len(twos):
            self._differ(f"has {len(twos)} operands instead of {len(ones)}", node.path)
        if not ones:
            return
        furthest: Difference | None = None
        for index, candidate in enumerate(twos):
            before = Match(dict(self.found.nodes), dict(self.found.weights), dict(self.found.regions))
            try:
                self.same(ones[0], candidate)
                self._operands(ones[1:], [*twos[:index], *twos[index + 1 :]], node)
                return
            except Difference as difference:
                self.found = before
                furthest = difference if furthest is None or difference.distance > furthest.distance else furthest
        assert furthest is not None
        raise furthest

    def _differ(self, message: str, path: str) -> None:
        raise Difference(f"{path} {message}", self.other.nodes[path], len(self.found.nodes))


@contextmanager
def _deep() -> Generator[None]:
    """The walk is as deep as the longest chain of operations."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, 100_000))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
