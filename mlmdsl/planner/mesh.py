"""The grid of ranks, and which links the groups of an axis cross.

Ranks lie in (pipeline, data, tensor), tensor innermost, and fill node after node: the axis that talks most is nearest.
"""

from __future__ import annotations

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

    def stride(self, axis: str) -> int:
        """Distance between neighbours of a group."""
        return {"tensor": 1, "data": self.tensor, "pipeline": self.tensor * self.data, "world": 1}[axis]

    def size(self, axis: str) -> int:
        world = self.tensor * self.data * self.pipeline
        return {"tensor": self.tensor, "data": self.data, "pipeline": self.pipeline, "world": world}[axis]

    def per_node(self, axis: str) -> int:
        """Members of one group that share a node (of the first group; the others lie alike where degrees divide the node)."""
        return max(1, min(self.size(axis), self.devices_per_node // self.stride(axis)))

    def crosses_nodes(self, axis: str) -> bool:
        return (self.size(axis) - 1) * self.stride(axis) >= self.devices_per_node

    def ranks(self, axis: str, rank: int = 0) -> tuple[int, ...]:
        """The ranks of `rank`'s group."""
        stride, size = self.stride(axis), self.size(axis)
        first = rank - (rank // stride % size) * stride
        return tuple(first + i * stride for i in range(size))


@dataclass(frozen=True)
class Network:
    """A cluster's two levels of links."""

    intra: Link
    inter: Link
    devices_per_node: int

    @cached_property
    def inter_bytes_per_second(self) -> float:
        return self.inter.bytes_per_second / self.inter.oversubscription


def network_of(cluster: Cluster) -> Network:
    """The slowest of each level where pools differ."""
    intra = min((p.intra for p in cluster.pools), key=lambda link: link.bytes_per_second)
    return Network(intra, cluster.inter or intra, min(p.devices_per_node for p in cluster.pools))
