"""Which value goes where: every value of a graph with what uses it, and the region whose code brings it to its users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from mlmdsl.frozen import frozen
from mlmdsl.graph.graph import Carried, Graph, Node


@frozen
class Use:
    """A value as it is left (`producer`'s output) and what asks for it: (node, input index; -1 for a carry's boundary).
    `region` is the index of the region in whose code it is brought where it is wanted."""

    value: str
    producer: int
    consumers: tuple[tuple[int, int], ...]
    region: int
    passes: int


@frozen
class Flow:
    graph: Graph

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(self.graph.nodes.values())

    @cached_property
    def index(self) -> Mapping[str, int]:
        return {node.path: i for i, node in enumerate(self.nodes)}

    @cached_property
    def uses(self) -> tuple[Use, ...]:
        """Every value with what asks for it, in the order of values. A value made outside a repeat and used inside is brought
        where it is wanted outside, once. After a repeat the last pass's value lies as the boundary does, and every region that
        uses it brings it where it wants it."""
        inside: dict[str, list[tuple[int, int]]] = {}
        after: dict[tuple[str, int], list[tuple[int, int]]] = {}

        def ask(value: str, region: int, consumer: tuple[int, int]) -> None:
            away = value in self._results and self._region_number[value] != region
            (after.setdefault((value, region), []) if away else inside.setdefault(value, [])).append(consumer)

        for number, region in enumerate(self.graph.regions):
            for node in region.nodes:
                for position, source in enumerate(node.inputs):
                    ask(source, number, (self.index[node.path], position))
            for carried in region.carried:
                ask(carried.initial, number, (self.index[carried.entry], -1))
                ask(carried.next, number, (self.index[carried.entry], -1))
        made = [self._use(v, self.index[v], uses, self._region_number[v]) for v, uses in inside.items()]
        return (*made, *(self._use(v, self.index[self._results[v].entry], uses, n) for (v, n), uses in after.items()))

    def _use(self, value: str, producer: int, consumers: Sequence[tuple[int, int]], region: int) -> Use:
        others = tuple(c for c in consumers if c[0] != producer)
        return Use(value, producer, others, region, self.graph.regions[region].count)

    @cached_property
    def _results(self) -> Mapping[str, Carried]:
        return {c.next: c for region in self.graph.regions for c in region.carried}

    @cached_property
    def _region_number(self) -> Mapping[str, int]:
        return {node.path: i for i, region in enumerate(self.graph.regions) for node in region.nodes}
