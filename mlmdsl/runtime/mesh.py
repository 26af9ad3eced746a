"""The grid of ranks: torch.arange(world).view(pipeline, data, tensor), tensor innermost."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mlmdsl.runtime.config import Parallel


@dataclass(frozen=True)
class Axis:
    """One axis of the grid as this rank sees it: the ranks that differ from it in this coordinate alone.

    Collectives are given the group's name: an autograd.Function that takes a ProcessGroup breaks a compiled graph
    (pytorch/pytorch#129942)."""

    name: str
    size: int = 1
    rank: int = 0
    group_name: str = ""


@dataclass(frozen=True)
class Mesh:
    """`devices` names its axes (pipeline, tensor, data): FSDP cuts what the tensor axis has cut already, so that a DTensor on
    (tensor, data) describes a weight in a checkpoint. None in a single process."""

    tensor: Axis
    data: Axis
    pipeline: Axis
    device: torch.device
    devices: DeviceMesh | None = field(default=None, compare=False)

    @property
    def world_size(self) -> int:
        return self.tensor.size * self.data.size * self.pipeline.size

    def group(self, axis: str) -> dist.ProcessGroup:
        assert self.devices is not None
        return self.devices.get_group(axis)


def single(device: torch.device) -> Mesh:
    """One process on its own, without a process group."""
    return Mesh(Axis("tensor"), Axis("data"), Axis("pipeline"), device)


def create(parallel: Parallel, device: torch.device) -> Mesh:
    """The grid over the default process group, which has parallel.world_size ranks."""
    if parallel.world_size == 1:
        return single(device)
    ranks = torch.arange(parallel.world_size).view(parallel.pipeline, parallel.data, parallel.tensor)
    grid = ranks.permute(0, 2, 1).tolist()  # no view: torch 2.11 goes by strides, and those of dims of size 1 mislead it
    devices = DeviceMesh(device.type, grid, mesh_dim_names=("pipeline", "tensor", "data"))

    def axis(name: str, size: int) -> Axis:
        return Axis(name, size, devices.get_local_rank(name), devices.get_group(name).group_name)

    return Mesh(
        tensor=axis("tensor", parallel.tensor),
        data=axis("data", parallel.data),
        pipeline=axis("pipeline", parallel.pipeline),
        device=device,
        devices=devices,
    )
