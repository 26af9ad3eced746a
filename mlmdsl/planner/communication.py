"""Time of collectives: latency plus bytes over the slowest link, hierarchical where a group crosses nodes.

Ring and pairwise algorithms as in Thakur, Rabenseifner and Gropp 2005 (Optimization of Collective Communication Operations in
MPICH): each of n ranks sends (n-1)/n of the whole in n-1 steps; an all_reduce is a reduce_scatter and an all_gather. Within a node NCCL
runs several rings over all links at once; across nodes each device drives its own share of the network, so that the members of a
group on one node share the load (NVIDIA/nccl #157: hierarchical rings).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from mlmdsl.planner.mesh import Mesh, Network

# Share of the printed bandwidth that large messages reach: NCCL's bus bandwidth on NVLink and InfiniBand (nccl-tests, published runs)
_EFFICIENCY = {
    "nvlink": 0.8,
    "infinity_fabric": 0.7,
    "pcie": 0.8,
    "infiniband": 0.85,
    "roce": 0.8,
    "ethernet": 0.8,
    "shm": 0.8,
    "loopback": 1.0,
}


@dataclass(frozen=True, slots=True)
class Group:
    """What the time of a collective depends on: members, members per node, and the two links."""

    size: int
    per_node: int
    intra_bytes_per_second: float
    intra_latency: float
    inter_bytes_per_second: float
    inter_latency: float

    @property
    def nodes(self) -> int:
        return ceil(self.size / self.per_node)


def group_of(mesh: Mesh, axis: str, network: Network) -> Group:
    intra, inter = network.intra, network.inter
    return Group(
        mesh.size(axis),
        mesh.per_node(axis),
        intra.bytes_per_second * _EFFICIENCY[intra.kind],
        intra.latency_seconds,
        network.inter_bytes_per_second * _EFFICIENCY[inter.kind],
        inter.latency_seconds,
    )


def collective_seconds(kind: str | None, size_bytes: float, group: Group) -> float:
    """Time of one collective whose larger side is `size_bytes` on each rank; 0 for None and for a local split."""
    n = group.size
    if n == 1 or kind in (None, "split"):
        return 0.0
    if kind == "all_reduce":
        return 2 * _ring(size_bytes, group)
    if kind in ("all_gather", "reduce_scatter"):
        return _ring(size_bytes, group)
    if kind == "all_to_all":
        return _all_to_all(size_bytes, group)
    assert kind in ("send", "recv"), kind
    return send_seconds(size_bytes, group)


def _ring(size_bytes: float, group: Group) -> float:
    """Reduce_scatter or all_gather: within the nodes on the whole, across them on what each member of a node is left with."""
    local, nodes = group.per_node, group.nodes
    inside = _one_level(size_bytes, local, group.intra_bytes_per_second, group.intra_latency)
    if nodes == 1:
        return inside
    return inside + _one_level(size_bytes / local, nodes, group.inter_bytes_per_second, group.inter_latency)


def _one_level(size_bytes: float, members: int, bytes_per_second: float, latency: float) -> float:
    """(n-1)/n of the bytes; latency of a tree for small messages, of the ring's steps never more than that of 16 (NCCL's trees)."""
    if members <= 1:
        return 0.0
    steps = min(members - 1, 2 * ceil(log2(members)) + 2)
    return size_bytes * (members - 1) / members / bytes_per_second + steps * latency


def _all_to_all(size_bytes: float, group: Group) -> float:
    n, local = group.size, group.per_node
    inside = size_bytes * (local - 1) / n / group.intra_bytes_per_second
    across = size_bytes * (n - local) / n / group.inter_bytes_per_second if group.nodes > 1 else 0.0
    return max(inside, across) + (group.inter_latency if group.nodes > 1 else group.intra_latency)


def send_seconds(size_bytes: float, group: Group) -> float:
    """Point to point between neighbours of the group, over the slower link where any pair crosses nodes."""
    if group.nodes > 1:
        return size_bytes / group.inter_bytes_per_second + group.inter_latency
    return size_bytes / group.intra_bytes_per_second + group.intra_latency
