"""The grid of ranks, and which links the groups of an axis cross.

Ranks are torch.arange(world) in the shape of four axes and fill node after node: what the innermost axes say to each other
stays nearest. The plan's `order` names them from the outermost to the innermost: pipeline, data, context, tensor, or data,
pipeline, context, tensor, where the stages of one pipeline are nearer to each other than its replicas.

Axes are "tensor", "context", "data", "pipeline"; "replicas" for data and context together, over which weights are alike;
"expert" for neighbours among the replicas, which share one set of experts, and "copies" for the ranks that have the same
experts; "shards" for neighbours among the replicas over which hybrid sharding lays one copy of the weights, and "replicate"
for the ranks that have the same shards; and "world" for all ranks.

A group is a mixed-radix number: levels of (size, distance between neighbours), the outermost first. There are two where other
axes lie between data and context.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import product
from math import prod

from mlmdsl.frozen import frozen
from mlmdsl.grammar.constraints import USUAL, Order
from mlmdsl.grammar.spec import Link

Levels = tuple[tuple[int, int], ...]


@frozen
class Mesh:
    """Degrees over a cluster whose nodes have `devices_per_node` devices (where pools differ, as pools.py counts them)."""

    tensor: int
    data: int
    pipeline: int
    devices_per_node: int
    context: int = 1
    expert: int = 1
    replicate: int = 1
    order: Order = USUAL

    @property
    def replicas(self) -> int:
        """Ranks with the same weights."""
        return self.data * self.context

    @property
    def world_size(self) -> int:
        return self.tensor * self.replicas * self.pipeline

    @cached_property
    def _axes(self) -> dict[str, tuple[int, int]]:
        """(size, distance between neighbours) of the four axes."""
        sizes = {"pipeline": self.pipeline, "data": self.data, "context": self.context, "tensor": self.tensor}
        names = self.order.split("_")
        return {name: (sizes[name], prod(sizes[inner] for inner in names[i + 1 :])) for i, name in enumerate(names)}

    @cached_property
    def _laid_out(self) -> dict[str, Levels]:
        axes, shards = self._axes, self.replicas // self.replicate
        found: dict[str, Levels] = {axis: (level,) for axis, level in axes.items()}
        found["world"] = ((self.world_size, 1),)
        replicas = _joined(axes["data"], axes["context"])
        found["replicas"] = replicas
        found["copies"], found["expert"] = _parted(replicas, self.expert)
        found["replicate"], found["shards"] = _parted(replicas, shards)
        return found

    def levels(self, axis: str) -> Levels:
        return self._laid_out[axis]

    def size(self, axis: str) -> int:
        return prod(size for size, _ in self.levels(axis))

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(pipeline, data, context, tensor) of a rank."""

        def along(axis: str) -> int:
            size, stride = self._axes[axis]
            return rank // stride % size

        return along("pipeline"), along("data"), along("context"), along("tensor")

    def rank(self, pipeline: int, data: int, context: int = 0, tensor: int = 0) -> int:
        """The one with these coordinates."""
        places = {"pipeline": pipeline, "data": data, "context": context, "tensor": tensor}
        return sum(places[axis] * stride for axis, (_, stride) in self._axes.items())

    def ranks(self, axis: str, rank: int = 0) -> tuple[int, ...]:
        """The ranks of `rank`'s group."""
        levels = self.levels(axis)
        first = rank - sum(rank // stride % size * stride for size, stride in levels)
        steps = (range(0, size * stride, stride) for size, stride in levels)
        return tuple(first + sum(each) for each in product(*steps))

    def groups(self, axis: str) -> Iterator[tuple[int, ...]]:
        """All groups of the axis, which partition the ranks."""
        levels = self.levels(axis)
        firsts = (rank for rank in range(self.world_size) if all(rank // stride % size == 0 for size, stride in levels))
        return (self.ranks(axis, first) for first in firsts)

    def per_node(self, axis: str) -> int:
        """Members of one group that share a node: the fewest that any node has of any group."""
        node, found = self.devices_per_node, 1
        if self.world_size <= node:
            return self.size(axis)
        levels = self.levels(axis)
        for size, stride in levels:
            if size == 1 or node % (stride * size) == 0:
                found *= size
            elif node % stride == 0 and (stride * size) % node == 0:
                found *= node // stride
            elif stride % node:
                return self._unevenly(levels[0]) if len(levels) == 1 else self._counted(axis)
        return found

    def _unevenly(self, level: tuple[int, int]) -> int:
        """`per_node` where groups lie on nodes in several ways."""
        (size, stride), node = level, self.devices_per_node
        if stride >= node:
            return 1
        blocks = range(0, self.world_size, stride * size)[:node]  # after as many they lie on nodes as before
        firsts = {(block + first) % node for block in blocks for first in range(stride)}
        return min(_fewest(first, stride, size, node) for first in firsts)

    def _counted(self, axis: str) -> int:
        nodes = (Counter(rank // self.devices_per_node for rank in group) for group in self.groups(axis))
        return min(min(counted.values()) for counted in nodes)

    def crosses_nodes(self, axis: str) -> bool:
        """Whether any group of the axis has members on two nodes."""
        return self.per_node(axis) < self.size(axis)


def _fewest(first: int, stride: int, size: int, node: int) -> int:
    """Of a group's members, that many share a node at the least: the first node's, the last one's, or of those between, which
    are alike after `stride` of them."""
    nodes = range(first // node, (first + (size - 1) * stride) // node + 1)
    counted = [
        min(size, -(-(node * (n + 1) - first) // stride)) - max(0, -(-(node * n - first) // stride))
        for n in {*nodes[: stride + 2], nodes[-1]}
    ]
    return min(counted)


def _joined(outer: tuple[int, int], inner: tuple[int, int]) -> Levels:
    """Levels of two axes together; one where members go on from group to group at the same distance."""
    (n, apart), (m, stride) = outer, inner
    if n == 1 or m == 1:
        return (inner if n == 1 else outer,)
    return ((n * m, stride),) if apart == m * stride else (outer, inner)


def _parted(levels: Levels, count: int) -> tuple[Levels, Levels]:
    """Of a group in parts of `count` neighbours: the members with the same place in each part; the members of one part."""
    *outer, (size, stride) = levels
    if not outer or size % count == 0:
        return (*outer, (size // count, stride * count)), ((count, stride),)
    ((n, apart),) = outer
    assert count % size == 0, (levels, count)
    rows = count // size
    return ((n // rows, apart * rows),), ((rows, apart), (size, stride))


def shares_out(order: Order, context: int, expert: int) -> bool:
    """Whether the replicas fall into groups of `expert` neighbours that lie alike: where other axes lie between data and
    context, a group is a part of a sequence's ranks, or several whole ones."""
    return order == USUAL or context % expert == 0 or expert % context == 0


@frozen
class Network:
    """A cluster's two levels of links."""

    intra: Link
    inter: Link
    devices_per_node: int

    @cached_property
    def inter_bytes_per_second(self) -> float:
        return self.inter.bytes_per_second / self.inter.oversubscription

    def link(self, mesh: Mesh, axis: str) -> Link:
        """The slowest link that groups of the axis cross."""
        return self.inter if mesh.crosses_nodes(axis) else self.intra
