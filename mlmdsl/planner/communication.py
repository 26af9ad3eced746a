"""Time of collectives: alpha-beta over the links that a group crosses.

With n ranks, latency alpha and bandwidth beta, for V bytes on the larger side of a rank's buffers (Thakur, Rabenseifner and
Gropp 2005, Optimization of Collective Communication Operations in MPICH, sections 4.1 to 4.5):

    all_gather, reduce_scatter    steps x alpha + (n-1)/n x V / beta
    all_reduce                    twice that: a reduce_scatter and an all_gather
    all_to_all                    alpha + (n-1)/n x V / beta, all peers at once
    send                          alpha + V / beta

Rings take n-1 steps; beyond a few ranks libraries change to algorithms of logarithmic depth (recursive doubling there, trees
and PAT in NCCL). A group with k members on each of m nodes runs k rings at once, each through its own device's share of the
network: every ring's share of the bytes goes once round all members, and so through each link. Inside and across are
pipelined, so that the slower one counts (two nodes of 8 A100 with 4 x 200 Gb/s: 91 of 100 GB/s, NVIDIA/nccl-tests #100).
Groups that lie across each other do not contend: each device drives its own share, as the bandwidths of a cluster are per
device.
"""

from __future__ import annotations

from math import ceil, log2

from mlmdsl.frozen import frozen
from mlmdsl.planner.mesh import Mesh, Network

# Share of a link's line rate that large messages reach. NVLink: 229 of 300 GB/s on an A100 (vTrain's traces), 370 of 450 on an
# H100 for every collective but those that NVLink SHARP helps (NVIDIA/nccl-tests #212), 606 to 668 of 900 on a B200 (SimuMax);
# InfiniBand: 91 of 100 GB/s (#100). The others are taken alike; loopback is what was measured.
_SHARE = {
    "nvlink": 0.78,
    "infinity_fabric": 0.75,
    "pcie": 0.8,
    "infiniband": 0.9,
    "roce": 0.85,
    "ethernet": 0.8,
    "shm": 1.0,
    "loopback": 1.0,
}
_OTHER_SHARE = 0.8
# Of a GPU, from the call of a collective to its first message: its kernel's start and the ranks' meeting. On 8 A100 an
# all_reduce of 1 MB takes 92 us, of which 14 steps of 4 us and 7 us of bytes (vTrain's traces, github.com/VIA-Research/vTrain);
# on 8 B200 22 to 26 us (SimuMax). gloo's is in its links' latency.
_CALL_SECONDS = 26e-6
_HOST_LINKS = ("loopback", "shm")


@frozen
class Group:
    """What the time of a collective depends on: members, members per node, and the two links as messages see them."""

    size: int
    per_node: int
    intra_bytes_per_second: float
    intra_latency: float
    inter_bytes_per_second: float
    inter_latency: float
    call_seconds: float = 0.0

    @property
    def nodes(self) -> int:
        return ceil(self.size / self.per_node)


def share_of(kind: str) -> float:
    """Of a link's line rate, what large messages reach."""
    return _SHARE.get(kind, _OTHER_SHARE)


def group_of(mesh: Mesh, axis: str, network: Network) -> Group:
    """The groups of an axis, which are alike; where they are not, the worst of them."""
    intra, inter = network.intra, network.inter
    return Group(
        mesh.size(axis),
        mesh.per_node(axis),
        intra.bytes_per_second * share_of(intra.kind),
        intra.latency_seconds,
        network.inter_bytes_per_second * share_of(inter.kind),
        inter.latency_seconds,
        0.0 if intra.kind in _HOST_LINKS else _CALL_SECONDS,
    )


def collective_seconds(kind: str | None, size_bytes: float, group: Group) -> float:
    """Time of one collective whose larger side is `size_bytes` on each rank; 0 for None and for a local split."""
    if group.size == 1 or kind in (None, "split"):
        return 0.0
    if kind == "all_reduce":
        return group.call_seconds + 2 * _ring_seconds(size_bytes, group)
    if kind in ("all_gather", "reduce_scatter"):
        return group.call_seconds + _ring_seconds(size_bytes, group)
    if kind == "all_to_all":
        return group.call_seconds + _all_to_all_seconds(size_bytes, group)
    assert kind in ("send", "recv"), kind
    return send_seconds(size_bytes, group)


def _ring_seconds(size_bytes: float, group: Group) -> float:
    """A reduce_scatter or an all_gather."""
    local, nodes = group.per_node, group.nodes
    inside = size_bytes * (group.size - 1) / group.size / group.intra_bytes_per_second if local > 1 else 0.0
    across = size_bytes / local * (group.size - 1) / group.size / group.inter_bytes_per_second if nodes > 1 else 0.0
    return max(inside, across) + _steps(local) * group.intra_latency + _steps(nodes) * group.inter_latency


def _steps(members: int) -> int:
    """Messages one after another: a ring's, or a tree's up and down with a few to fill it."""
    return 0 if members == 1 else min(members - 1, 2 * ceil(log2(members)) + 2)


def _all_to_all_seconds(size_bytes: float, group: Group) -> float:
    n, local = group.size, group.per_node
    inside = size_bytes * (local - 1) / n / group.intra_bytes_per_second
    across = size_bytes * (n - local) / n / group.inter_bytes_per_second
    return max(inside, across) + (group.inter_latency if group.nodes > 1 else group.intra_latency)


def send_seconds(size_bytes: float, group: Group) -> float:
    """Point to point between neighbours of the group, over the slower link where any pair crosses nodes."""
    if group.nodes > 1:
        return size_bytes / group.inter_bytes_per_second + group.inter_latency
    return size_bytes / group.intra_bytes_per_second + group.intra_latency
