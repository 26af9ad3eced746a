"""The grid of ranks, and which links the groups of an axis cross.

Ranks are torch.arange(world).view(pipeline, data, context, tensor), tensor innermost, and fill node after node: the axis that
talks most is nearest. Axes are "tensor", "context", "data", "pipeline"; "replicas" for data and context together, over which
weights are alike; "expert" for neighbours among the replicas, which share one set of experts, and "copies" for the ranks that
have the same experts; "shards" for neighbours among the replicas over which hybrid sharding lays one copy of the weights, and
"replicate" for the ranks that have the same shards; and "world" for all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from mlmdsl.grammar.spec import Link


@dataclass(frozen=True)
class Mesh:
    """Degrees over a cluster whose nodes have `devices_per_node` devices (where pools differ, as pools.py counts them)."""

    tensor: int
    data: int
    pipeline: int
    devices_per_node: int
    context: int = 1
    expert: int = 1
    replicate: int = 1

    @property
    def replicas(self) -> int:
        """Ranks with the same weights."""
        return self.data * self.context

    @property
    def world_size(self) -> int:
        return self.tensor * self.replicas * self.pipeline

    @cached_property
    def _laid_out(self) -> dict[str, tuple[int, int]]:
        """(size, distance between neighbours of a group) by axis."""
        inner = self.tensor * self.context
        shards = self.replicas // self.replicate
        return {
            "tensor": (self.tensor, 1),
            "context": (self.context, self.tensor),
            "data": (self.data, inner),
            "replicas": (self.replicas, self.tensor),
            "expert": (self.expert, self.tensor),
            "copies": (self.replicas // self.expert, self.tensor * self.expert),
            "shards": (shards, self.tensor),
            "replicate": (self.replicate, self.tensor * shards),
            "pipeline": (self.pipeline, inner * self.data),
            "world": (self.world_size, 1),
        }

    def size(self, axis: str) -> int:
        return self._laid_out[axis][0]

    def stride(self, axis: str) -> int:
        """Distance between neighbours of a group."""
        return self._laid_out[axis][1]

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(pipeline, data, context, tensor) of a rank."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return pipeline, data, context, tensor

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
