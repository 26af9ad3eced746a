"""Operations without computation: what the data loader feeds, and what a repeat carries."""

from __future__ import annotations

from collections.abc import Mapping

from mlmdsl.graph.graph import Scalar
from mlmdsl.graph.ops.base import Op, Work, sequence_dims
from mlmdsl.graph.ops.common import shard_name, shardable
from mlmdsl.graph.placement import BROADCAST, REPLICATE, Strategy, shard
from mlmdsl.graph.tensor import TensorType


def _on_context(
    types: tuple[TensorType, ...], out: TensorType, weights: tuple[tuple[int, ...], ...], attrs: Mapping[str, Scalar]
) -> tuple[Strategy, ...]:
    """Each rank has its part of every sequence; what has none is whole everywhere."""
    dims = sequence_dims(out)
    return (Strategy("sequence", (), (), shard(dims[0])) if dims else Strategy("broadcast", (), (), BROADCAST),)


def _given_on_context(
    types: tuple[TensorType, ...], out: TensorType, weights: tuple[tuple[int, ...], ...], attrs: Mapping[str, Scalar]
) -> tuple[Strategy, ...]:
    """The data loader gives each rank its part, or the whole."""
    whole = (Strategy("replicated", (), (), REPLICATE),) if out.dtype == "int" else ()
    return (*_on_context(types, out, weights, attrs), *whole)


OPS = (
    Op(
        name="input",
        doc="A model input or the objective's targets: whole on every rank.",
        infer=lambda types, attrs: types[0],
        strategies=lambda types, out, weights, attrs, n: (Strategy("replicated", (), (), REPLICATE),),
        work=lambda local: Work("none", kernels_forward=0, kernels_backward=0),
        emit=lambda e: "",
        context=_given_on_context,
    ),
    Op(
        name="carry",
        doc="A variable of a repeat at the start of a pass: whole, or cut along one dim.",
        infer=lambda types, attrs: types[0],
        strategies=lambda types, out, weights, attrs, n: (
            Strategy("replicated", (), (), REPLICATE),
            *(Strategy(shard_name(out, d), (), (), shard(d)) for d in shardable(out, n)),
        ),
        work=lambda local: Work("none", kernels_forward=0, kernels_backward=0),
        emit=lambda e: "",
        context=_on_context,
    ),
)
