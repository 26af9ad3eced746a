"""What the ranks of a pipeline stage lie on, where a cluster has pools of unlike nodes.

Ranks fill the pools in the order of the text, and the pipeline is the outermost axis of their grid (where a pin puts it inside
data, every stage is planned as if it lay on all pools): a stage is a contiguous run of ranks, on one pool or, where it
straddles the end of one, on several. There it is planned as the weakest of these in every respect, since the ranks of a stage
do the same work and wait for each other. Groups inside a stage (tensor, context, expert, data) go over the links of its own
site; what crosses pools goes over the cluster's link between nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import gcd

from mlmdsl.grammar.spec import Cluster, Device, Pool
from mlmdsl.planner.communication import Group, group_of
from mlmdsl.planner.compute import Kernels, slowest_of
from mlmdsl.planner.memory import capacity_bytes
from mlmdsl.planner.mesh import Mesh, Network
from mlmdsl.planner.plan import PoolFacts


@dataclass(frozen=True, eq=False)
class Site:
    """A device, what a plan may use of its memory, its kernels, and the links between the ranks of a stage."""

    device: Device
    capacity_bytes: int
    kernels: Kernels
    network: Network


def group_on(site: Site, mesh: Mesh, axis: str) -> Group:
    """Groups of an axis whose ranks lie there."""
    per_node = site.network.devices_per_node
    there = mesh if per_node == mesh.devices_per_node else replace(mesh, devices_per_node=per_node)
    return group_of(there, axis, site.network)


def size_of(pool: Pool) -> int:
    """Devices."""
    return pool.nodes * pool.devices_per_node


def firsts(cluster: Cluster) -> list[int]:
    """Each pool's first rank, and the number of all ranks."""
    return list(accumulate(map(size_of, cluster.pools), initial=0))


def pools_of(cluster: Cluster, stages: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    """By stage the indices of the pools that its `ranks` ranks lie on."""
    first = firsts(cluster)
    pools = range(len(cluster.pools))
    spans = ((stage * ranks, (stage + 1) * ranks) for stage in range(stages))
    return tuple(tuple(i for i in pools if first[i] < end and start < first[i + 1]) for start, end in spans)


def mean_peak(cluster: Cluster, precision: str) -> float:
    """FLOP/s of one device; of unlike ones the mean, so that all of them together have the sum of the pools' peaks."""
    peaks = [Kernels(pool.device, precision).peak for pool in cluster.pools]
    if len(set(peaks)) == 1:
        return peaks[0]
    return sum(size_of(pool) * peak for pool, peak in zip(cluster.pools, peaks, strict=True)) / cluster.world_size


def pool_facts(cluster: Cluster, mesh: Mesh, precision: str) -> tuple[PoolFacts, ...]:
    """What lies where; nothing to say of a single pool."""
    if len(cluster.pools) == 1:
        return ()
    return tuple(
        PoolFacts(
            name=pool.name,
            device=pool.device.name,
            device_memory_bytes=pool.device.memory_bytes,
            peak_flops_per_second=Kernels(pool.device, precision).peak,
            nodes=pool.nodes,
            devices_per_node=pool.devices_per_node,
            first_rank=first,
            stages=_stages_on(first, first + size_of(pool), mesh),
        )
        for pool, first in zip(cluster.pools, firsts(cluster), strict=False)
    )


def _stages_on(first: int, end: int, mesh: Mesh) -> tuple[int, ...]:
    """Pipeline ranks that any of the ranks `first` .. `end` - 1 has."""
    ((stages, ranks),) = mesh.levels("pipeline")
    return tuple(sorted({run % stages for run in range(first // ranks, -(-end // ranks))}))


class Sites:
    """The sites of a cluster; such that are alike in all that matters are one object."""

    def __init__(self, cluster: Cluster, precision: str, launch_seconds: float | None):
        self.cluster, self.precision, self.launch_seconds = cluster, precision, launch_seconds
        self._found: dict[tuple[int, ...], Site] = {}

    @property
    def weakest(self) -> Site:
        """Of all pools."""
        return self.on(tuple(range(len(self.cluster.pools))))

    @property
    def single(self) -> tuple[Site, ...]:
        """Of each pool."""
        return tuple(self.on((i,)) for i in range(len(self.cluster.pools)))

    @property
    def alike(self) -> bool:
        """Whether it makes no difference where a stage lies."""
        return all(site is self.weakest for site in self.single)

    def on(self, pools: tuple[int, ...]) -> Site:
        found = self._found.get(pools)
        if found is None:
            made = self._make(pools)
            like = (site for site in self._found.values() if _alike(site, made))
            found = self._found[pools] = next(like, made)
        return found

    def of(self, stages: int, ranks: int) -> tuple[Site, ...]:
        """By stage, of as many ranks each."""
        return tuple(map(self.on, pools_of(self.cluster, stages, ranks)))

    def _make(self, indices: Sequence[int]) -> Site:
        pools = [self.cluster.pools[i] for i in indices]
        device = weakest_device([pool.device for pool in pools], self.precision)
        intra = min((pool.intra for pool in pools), key=lambda link: link.bytes_per_second)
        network = Network(intra, self.cluster.inter or intra, self._node(indices))
        slowest = slowest_of(device.kind, self.cluster.world_size)
        return Site(device, capacity_bytes(device), Kernels(device, self.precision, self.launch_seconds, slowest), network)

    def _node(self, indices: Sequence[int]) -> int:
        """So many consecutive ranks, counted from rank 0, share a node. Where a pool begins amid the nodes of another's size,
        these are fewer than a node has."""
        first = firsts(self.cluster)
        return gcd(*(gcd(first[i], self.cluster.pools[i].devices_per_node) for i in indices))


def weakest_device(devices: Sequence[Device], precision: str) -> Device:
    """That of the least peak; with the least memory of all, the least bandwidth and the longest launches."""
    slowest = min(devices, key=lambda device: (Kernels(device, precision).peak, device.memory_bytes))
    weakest = {
        "memory_bytes": min(device.memory_bytes for device in devices),
        "memory_bytes_per_second": min(device.memory_bytes_per_second for device in devices),
        "launch_seconds": max(device.launch_seconds for device in devices),
    }
    return replace(slowest, **weakest)


def _alike(a: Site, b: Site) -> bool:
    return a.device == b.device and a.network == b.network
