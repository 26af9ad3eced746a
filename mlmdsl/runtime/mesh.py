"""The grid of ranks, as `Parallel.grid` lays it out."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mlmdsl.runtime.balance import Tally
from mlmdsl.runtime.config import Parallel


@dataclass(frozen=True)
class Axis:
    """One axis of the grid as this rank sees it: the ranks that differ from it in this coordinate alone.

    A value cut over the axis has one slice on each rank, in the order of ranks; `zigzag`: it is cut into twice as many;
    rank r has numbers r and 2 size - 1 - r, so that causal attention is as much work on every rank (Llama 3,
    arXiv:2407.21783, section 3.3.2).

    Collectives are given the group's name: an autograd.Function that takes a ProcessGroup breaks a compiled graph
    (pytorch/pytorch#129942)."""

    name: str
    size: int = 1
    rank: int = 0
    group_name: str = ""
    zigzag: bool = False


@dataclass(frozen=True)
class Mesh:
    """`devices` names its axes (pipeline, tensor, replicas), the replicas being the ranks of data and context, which hold the
    same weights: FSDP cuts what the tensor axis has cut already, so a DTensor on (tensor, replicas) describes a weight in a
    checkpoint. None in a single process. `sharers` has the same ranks with the axes (pipeline, tensor, copies, expert): the
    replicas in groups of neighbours that share one set of experts; None where every rank has all of them. `hybrid` has them
    with the axes (pipeline, tensor, replicate, shards): the replicas in groups of neighbours that share one copy of the weights
    under ZeRO; None where all of them do. `tally` is this rank's alone."""

    tensor: Axis
    data: Axis
    pipeline: Axis
    device: torch.device
    devices: DeviceMesh | None = field(default=None, compare=False)
    context: Axis = Axis("context", zigzag=True)
    expert: Axis = Axis("expert")
    sharers: DeviceMesh | None = field(default=None, compare=False)
    hybrid: DeviceMesh | None = field(default=None, compare=False)
    tally: Tally = field(default_factory=Tally, compare=False)

    @property
    def replicas(self) -> Axis:
        """Data and context together."""
        rank = self.data.rank * self.context.size + self.context.rank
        name = self.devices.get_group("replicas").group_name if self.devices is not None else ""
        return Axis("replicas", self.data.size * self.context.size, rank, name)

    @property
    def copies(self) -> Axis:
        """The ranks that have the same experts, where the expert axis shares them out."""
        replicas = self.replicas
        name = self.sharers.get_group("copies").group_name if self.sharers is not None else ""
        return Axis("copies", replicas.size // self.expert.size, replicas.rank // self.expert.size, name)

    @property
    def shards(self) -> Axis:
        """The ranks over which ZeRO shares out a weight that is no expert's."""
        if self.hybrid is None:
            return self.replicas
        group = self.hybrid.get_group("shards")
        return Axis("shards", group.size(), self.hybrid.get_local_rank("shards"), group.group_name)

    @property
    def sharing(self) -> DeviceMesh:
        """What FSDP2 is given: one axis of shards, or copies of them in front."""
        if self.hybrid is not None:
            return self.hybrid["replicate", "shards"]
        assert self.devices is not None
        return self.devices["replicas"]

    @property
    def world_size(self) -> int:
        return self.tensor.size * self.replicas.size * self.pipeline.size

    def group(self, axis: str) -> dist.ProcessGroup:
        devices = self.sharers if axis == "copies" else self.devices
        assert devices is not None
        return devices.get_group(axis)


def single(device: torch.device) -> Mesh:
    """One process on its own, without a process group."""
    return Mesh(Axis("tensor"), Axis("data"), Axis("pipeline"), device)


def create(parallel: Parallel, device: torch.device) -> Mesh:
    """The grid over the default process group, which has parallel.world_size ranks."""
    if parallel.world_size == 1:
        return single(device)
    # lists, no views: torch 2.11 goes by strides, and those of dims of size 1 mislead it
    grid = torch.tensor(parallel.grid)
    devices = DeviceMesh(device.type, parallel.grid, mesh_dim_names=("pipeline", "tensor", "replicas"))

    def axis(name: str, size: int) -> Axis:
        return Axis(name, size, devices.get_local_rank(name), devices.get_group(name).group_name)

    hybrid = None
    if parallel.zero and parallel.replicate > 1:
        names = ("pipeline", "tensor", "replicate", "shards")
        copied = grid.unflatten(-1, (parallel.replicate, -1))
        hybrid = DeviceMesh(device.type, copied.tolist(), mesh_dim_names=names)
    sharers, expert = None, Axis("expert")
    if parallel.expert > 1:
        names = ("pipeline", "tensor", "copies", "expert")
        shared = grid.unflatten(-1, (-1, parallel.expert))
        sharers = DeviceMesh(device.type, shared.tolist(), mesh_dim_names=names)
        expert = Axis("expert", parallel.expert, sharers.get_local_rank("expert"), sharers.get_group("expert").group_name)
    data, context = divmod(devices.get_local_rank("replicas"), parallel.context)
    return Mesh(
        tensor=axis("tensor", parallel.tensor),
        data=Axis("data", parallel.data, data),
        pipeline=axis("pipeline", parallel.pipeline),
        device=device,
        devices=devices,
        context=Axis("context", parallel.context, context, _context_group(parallel), zigzag=True),
        expert=expert,
        sharers=sharers,
        hybrid=hybrid,
    )


def _context_group(parallel: Parallel) -> str:
    """The name of this rank's group, out of those that all ranks make; "" where a group would have one rank."""
    mine = ""
    if parallel.context == 1:
        return mine
    for members in torch.tensor(parallel.grid).view(-1, parallel.context).tolist():
        group = dist.new_group(members)
        if dist.get_rank() in members:
            mine = group.group_name
    return mine
