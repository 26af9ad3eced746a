"""Pieces that the families of operations share: shardable dims, pass-through strategies, costs of memory-bound work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

from mlmdsl.graph.ops.base import Local, Work
from mlmdsl.graph.placement import BROADCAST, PARTIAL, REPLICATE, WHOLE, WHOLE_PARTIAL, Placement, Strategy, shard
from mlmdsl.graph.tensor import TensorType, symbols_of


def shardable(type: TensorType, axis_size: int, besides: Iterable[int] = ()) -> Iterator[int]:
    """Dims that an axis may cut: sizes that divide, and symbols (the sequence; never the batch, which is the data axis', nor
    rows that the batch is a factor of)."""
    for dim, size in enumerate(type.shape):
        if (
            dim not in besides
            and "B" not in symbols_of(size)
            and (isinstance(size, str) or (size % axis_size == 0 and size >= axis_size))
        ):
            yield dim


def sequence_dim(type: TensorType, dim: int) -> bool:
    return isinstance(type.shape[dim], str)


def shard_name(type: TensorType, dim: int) -> str:
    return "sequence" if sequence_dim(type, dim) else "sharded"


def pointwise(
    types: tuple[TensorType, ...], output: TensorType, axis_size: int, weights: int, besides: Iterable[int] = ()
) -> tuple[Strategy, ...]:
    """Every element of the output depends on those of the inputs at the same place, but for the dims in `besides`, which have
    to be whole. Inputs broadcast from the right: one that lacks the cut dim is whole, and its gradient a partial sum. Weights
    (vectors along the whole dims) see a slice of the values, so their gradients are partial sums too."""
    rank = len(output.shape)
    found = [
        Strategy("replicated", (REPLICATE,) * len(types), (WHOLE,) * weights, REPLICATE),
        Strategy("broadcast", (BROADCAST,) * len(types), (WHOLE_PARTIAL,) * weights, BROADCAST),
    ]
    for dim in shardable(output, axis_size, besides):
        inputs = tuple(_aligned(t, dim - rank + len(t.shape), output.shape[dim]) for t in types)
        found.append(Strategy(shard_name(output, dim), inputs, (WHOLE_PARTIAL,) * weights, shard(dim)))
    return tuple(found)


def _aligned(type: TensorType, dim: int, size: int | str) -> Placement:
    return shard(dim) if dim >= 0 and type.shape[dim] == size else BROADCAST


def partial(inputs: int) -> Strategy:
    """An operation that is linear in all its inputs jointly maps partial sums to partial sums."""
    return Strategy("partial", (PARTIAL,) * inputs, (), PARTIAL)


def elements(shape: tuple[int, ...]) -> int:
    return prod(shape)


def input_bytes(local: Local) -> float:
    return float(sum(prod(shape) * size for shape, size in zip(local.inputs, local.input_bytes, strict=True)))


def output_bytes(local: Local) -> float:
    return float(prod(local.output) * local.output_bytes)


def memory_bound(
    local: Local, saved: tuple[str, ...] = (), *, extra: float = 0.0, kernels: int = 1, backward: float = 1.5
) -> Work:
    """Reads its inputs and writes its output once; the backward pass moves `backward` times as much."""
    moved = input_bytes(local) + output_bytes(local)
    return Work(
        "memory",
        bytes_forward=moved,
        bytes_backward=backward * moved,
        saved=saved,
        extra_saved_bytes=extra,
        kernels_forward=kernels,
        kernels_backward=kernels,
    )
