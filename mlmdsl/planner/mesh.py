"""The grid of ranks, and which links the groups of an axis cross.

Ranks are torch.arange(world).view(pipeline, data, tensor), tensor innermost, and fill node after node: the axis that talks most
is nearest. Axes are "tensor", "data", "pipeline", and "world" for all ranks together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from mlmdsl.grammar.spec import Cluster, Link


@dataclass(frozen=True)
class Mesh:
    """Degrees over a cluster whose nodes have `devices_per_node` devices (the fewest, where pools differ)."""

    tensor: int
    data: int
    pipeline: int
    devices_per_node: int

    @property
    def world_size(self) -> int:
        return self.tensor * self.data * self.pipeline

    def size(self, axis: str) -> int:
        return {"tensor": self.tensor, "data": self.data, "pipeline": self.pipeline, "world": self.world_size}[axis]

    def stride(self, axis: str) -> int:
        """Distance between neighbours of a group."""
        return {"tensor": 1, "data": self.tensor, "pipeline": self.tensor * self.data, "world": 1}[axis]

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pipeline, data, tensor) of a rank."""
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return pipeline, data, tensor

    def ranks(self, axis: str, rank: int = 0) -> tuple[int, ...]:
        """The ranks of `rank`'s group."""
        stride, size = self.stride(axis), self.size(axis)
        first = rank - (rank // stride % size) * stride
        return tuple(first + i * stride for i in range(size))

    def groups(self, axis: str) -> Iterator[tuple[int, ...]]:
        """All groups of the axis, which partition the ranks."""
        stride, size = self.stride(axis), self.size(axis)
        for block in range(0, self.world_size, stride * size):
            for first in range(block, block + stride):
                yield tuple(range(first, first + stride * size, stride))

    def per_node(self, axis: str) -> int:
        """Members of one group that share a node: the fewest that any node has of any group."""
        stride, size, node = self.stride(axis), self.size(axis), self.devices_per_node
        if size == 1 or self.world_size <= node or node % (stride * size) == 0:
            return size
        if stride % node == 0:
            return 1
        if node % stride == 0 and (stride * size) % node == 0:
            return node // stride
        return min(min(Counter(rank // node for rank in group).values()) for group in self.groups(axis))

    def crosses_nodes(self, axis: str) -> bool:
        """Whether any group of the axis has members on two nodes."""
        return self.per_node(axis) < self.size(axis)


@dataclass(frozen=True)
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


def network_of(cluster: Cluster) -> Network:
    """The slowest of each level where pools differ."""
    intra = min((p.intra for p in cluster.pools), key=lambda link: link.bytes_per_second)
    return Network(intra, cluster.inter or intra, min(p.devices_per_node for p in cluster.pools))
