"""Weights that know their place in the whole, and what wraps a stage: meta construction, FSDP2.

A program's modules are made on the meta device, so that no rank ever holds what it does not own. `weight` gives the local
shape on the tensor axis; its WeightInfo stays beside it until `weights_of` has read it. Parameters are plain local tensors on
the tensor axis; FSDP2 cuts them further over the replicas (ZeRO 1 to 3), or groups of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from mlmdsl.runtime.config import Parallel, cut_over_copies, even_dim
from mlmdsl.runtime.initial import Init
from mlmdsl.runtime.mesh import Axis, Mesh

StageClass = Callable[[int, Mesh], nn.Module]


# ---- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightInfo:
    """`shape` is the whole weight's; `shard` the dim cut over the tensor axis, None where every rank has all of it; `partial`
    says that each rank's gradient is a partial sum over the tensor axis; `decay` that weight decay applies; `expert` that dim 0
    is cut over the expert axis; `balance`, where it is not 0, how far a step moves the weight against its gradient's sign."""

    shape: tuple[int, ...]
    init: Init
    shard: int | None
    partial: bool
    decay: bool
    expert: bool = False
    balance: float = 0.0


class Weight(nn.Parameter):
    """A parameter with its WeightInfo. FSDP2 and `to_empty` put ordinary parameters in its place."""

    info: WeightInfo


def weight(
    shape: Sequence[int],
    init: Init,
    tp: Axis | None = None,
    *,
    shard: int | None = None,
    partial: bool = False,
    decay: bool | None = None,
    ep: Axis | None = None,
    balance: float = 0.0,
) -> nn.Parameter:
    """This rank's part of a weight of `shape`, cut along dim `shard` over the axis. Values come later (`initial.fill`).

    decay None: matrices yes, vectors no. ep: a stack of experts, which this axis shares out. balance: see WeightInfo."""
    size = 1 if tp is None else tp.size
    local = list(shape)
    if shard is not None:
        assert local[shard] % size == 0, f"{tuple(shape)} cannot be cut along dim {shard} over {size} ranks"
        local[shard] //= size
    if ep is not None:
        assert local[0] % ep.size == 0, f"{shape[0]} experts cannot be shared out over {ep.size} ranks"
        local[0] //= ep.size
    parameter = Weight(torch.empty(local))
    parameter.info = WeightInfo(
        shape=tuple(shape),
        init=init,
        shard=shard if size > 1 else None,
        partial=partial and size > 1,
        decay=len(shape) > 1 if decay is None else decay,
        expert=ep is not None and ep.size > 1,
        balance=balance,
    )
    return parameter


class Scope(nn.Module):
    """A named group of weights and further groups; it computes nothing."""

    def __init__(self, **children: nn.Parameter | nn.Module):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


_PASS = re.compile(r"_\d+")  # of a repeat inside a block: names of users that begin with an underscore end with one, too


def public_name(path: str) -> str:
    """The weight's name in checkpoints: its path in the module, less the underscores of each part that stand there where the
    user's name would hide an attribute or a word of Python, and less that before the number of a pass."""
    return ".".join(_public_part(part) for part in path.split("."))


def _public_part(part: str) -> str:
    if _PASS.fullmatch(part):
        return part[1:]
    return part.removesuffix("__") if part.startswith("_") else part.removesuffix("_")


def weights_of(module: nn.Module) -> dict[str, WeightInfo]:
    """What a freshly made stage holds, by path in the module."""
    found: dict[str, WeightInfo] = {}
    for path, parameter in module.named_parameters():
        assert isinstance(parameter, Weight), f"{path} was not made by weight()"
        found[path] = parameter.info
    return found


def on_meta(make: StageClass, index: int, mesh: Mesh) -> nn.Module:
    with torch.device("meta"):
        return make(index, mesh)


# ---- FSDP2 ----------------------------------------------------------------------------------------------------------


def wrap_sharded(stage: nn.Module, parallel: Parallel, sharing: DeviceMesh, precision: str, ignored: set[nn.Parameter]) -> None:
    """ZeRO 1 to 3: every layer a unit of its own, what stands around the layers another; `ignored` stay as they are.

    With ZeRO 3 a layer's weights are let go after its forward pass and gathered again for its backward pass; the outer unit's
    backward pass follows its forward pass at once, so it keeps them. Gradients are summed, never averaged: the loss is divided
    by the count of valid tokens beforehand. set_gradient_divide_factor(1.0) alone still premultiplies, which gloo refuses."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if precision == "bf16" else None
    settings: dict[str, Any] = {"mesh": sharing, "ignored_params": ignored} | ({"mp_policy": policy} if policy else {})
    ranks = sharing.size(sharing.ndim - 1)
    settings["shard_placement_fn"] = lambda parameter: Shard(even_dim(parameter.shape, ranks))
    for layer in layers(stage):
        if any(parameter not in ignored for parameter in layer.parameters()):
            fully_shard(layer, reshard_after_forward=parallel.zero == 3, **settings)
    fully_shard(stage, reshard_after_forward=False, **settings)
    for unit in sharded_units(stage):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def layers(stage: nn.Module) -> Iterator[nn.Module]:
    """The passes of the model's repeats that the stage holds."""
    for child in stage.children():
        if isinstance(child, nn.ModuleDict):
            yield from child.values()


def sharded_units(stage: nn.Module) -> list[FSDPModule]:
    return [module for module in stage.modules() if isinstance(module, FSDPModule)]


# ---- places in the whole --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a rank's part of a weight lies in the whole: its offsets, and its local shape after tensor and data cuts."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def place(info: WeightInfo, mesh: Mesh, *, sharded: bool) -> Place:
    """`sharded`: over the ranks of ZeRO, as `even_dim` says, are cut all but experts that are shared out; those over the ranks
    that have the same ones, as `over_copies` says."""
    local, offsets = list(info.shape), [0] * len(info.shape)

    def cut(dim: int, ranks: int, rank: int) -> None:
        local[dim] //= ranks
        offsets[dim] += rank * local[dim]

    if info.shard is not None:
        cut(info.shard, mesh.tensor.size, mesh.tensor.rank)
    if info.expert:
        cut(0, mesh.expert.size, mesh.expert.rank)
        if sharded and over_copies(info, mesh):
            cut(1, mesh.copies.size, mesh.copies.rank)
    elif sharded:
        shards = mesh.shards
        dim = even_dim(local, shards.size)
        rows, chunk = local[dim], -(-local[dim] // shards.size)
        low = min(rows, shards.rank * chunk)
        local[dim] = min(chunk, rows - low)
        offsets[dim] += low
    return Place(tuple(offsets), tuple(local))


def over_copies(info: WeightInfo, mesh: Mesh) -> bool:
    """Whether ZeRO cuts the weight as `cut_over_copies` says."""
    return info.expert and cut_over_copies(place(info, mesh, sharded=False).shape, mesh.copies.size)


def local_part(x: Tensor) -> Tensor:
    """The tensor behind a DTensor, or the tensor itself; shares memory."""
    return x._local_tensor if hasattr(x, "_local_tensor") else x
