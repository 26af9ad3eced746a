"""Tokens to vectors: embeddings and learned positions."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from mlmdsl.graph.graph import Scalar
from mlmdsl.graph.ops.base import Emission, Local, Op, ShapeProblem, WeightSpec, Work
from mlmdsl.graph.ops.common import output_bytes, shardable
from mlmdsl.graph.ops.linear import integer, number
from mlmdsl.graph.placement import BROADCAST, PARTIAL, REPLICATE, WHOLE, WHOLE_PARTIAL, Strategy, WeightPlacement, shard
from mlmdsl.graph.tensor import Init, TensorType

Types = tuple[TensorType, ...]
Attributes = Mapping[str, Scalar]


def _tokens(types: Types) -> TensorType:
    if types[0].dtype != "int":
        raise ShapeProblem("MLM0502", f"this wants integers (token ids), not {types[0]}", 0)
    return types[0]


def _embedding_strategies(
    types: Types, out: TensorType, weights: tuple[tuple[int, ...], ...], attrs: Attributes, n: int
) -> tuple[Strategy, ...]:
    vocab, dim = weights[0]
    last = len(out.shape) - 1
    found = [
        Strategy("replicated", (REPLICATE,), (WHOLE,), REPLICATE),
        Strategy("broadcast", (REPLICATE,), (WHOLE_PARTIAL,), BROADCAST),
    ]
    if vocab % n == 0:
        found.append(Strategy("vocabulary", (REPLICATE,), (WeightPlacement(0),), PARTIAL))
    if dim % n == 0:
        found.append(Strategy("hidden", (REPLICATE,), (WeightPlacement(1),), shard(last)))
    for d in shardable(out, n, besides=(last,)):
        found.append(Strategy("sequence", (shard(d),), (WHOLE_PARTIAL,), shard(d)))
    return tuple(found)


def _embedding_emit(e: Emission) -> str:
    if e.strategy.name == "vocabulary":
        return f"vocab_parallel_embedding({e.inputs[0]}, {e.weights[0]}, {e.axis})"
    return f"F.embedding({e.inputs[0]}, {e.weights[0]})"


def _embedding_work(local: Local) -> Work:
    moved = 2 * output_bytes(local)
    return Work("memory", bytes_forward=moved, bytes_backward=1.5 * moved, saved=("in0",))


def _position_strategies(
    types: Types, out: TensorType, weights: tuple[tuple[int, ...], ...], attrs: Attributes, n: int
) -> tuple[Strategy, ...]:
    found = [
        Strategy("replicated", (REPLICATE,), (WHOLE,), REPLICATE),
        Strategy("broadcast", (REPLICATE,), (WHOLE_PARTIAL,), BROADCAST),
        Strategy("sequence", (REPLICATE,), (WHOLE_PARTIAL,), shard(0)),
    ]
    if weights[0][1] % n == 0:
        found.append(Strategy("hidden", (REPLICATE,), (WeightPlacement(1),), shard(1)))
    return tuple(found)


def _position_type(types: Types, attrs: Attributes) -> TensorType:
    tokens = _tokens(types)
    if len(tokens.shape) != 2:
        raise ShapeProblem("MLM0503", f"this wants tokens [B, S], not {tokens}", 0)
    return TensorType("float", (tokens.shape[1], integer(attrs, "dim")))


def _position_emit(e: Emission) -> str:
    length = f"{e.inputs[0]}.size(1)"
    if e.strategy.name != "sequence":
        return f"positions({e.weights[0]}, {length}{f', cut=({e.cut},)' if e.cut else ''})"
    return f"positions({e.weights[0]}, {length} // {e.axis_size}, cut=({e.cut}{'' if e.context else ','}))"


OPS = (
    Op(
        name="embedding",
        doc="Row `t` of a table [vocab, dim] for each token `t`.",
        infer=lambda types, attrs: TensorType("float", (*_tokens(types).shape, integer(attrs, "dim"))),
        strategies=_embedding_strategies,
        work=_embedding_work,
        emit=_embedding_emit,
        imports=("vocab_parallel_embedding",),
        weights=lambda types, attrs: (
            WeightSpec("weight", (integer(attrs, "vocab"), integer(attrs, "dim")), Init("normal", number(attrs, "std"))),
        ),
    ),
    Op(
        name="position",
        doc="Learned positions: the first S rows of a table [max, dim], for tokens [B, S].",
        infer=_position_type,
        strategies=_position_strategies,
        work=lambda local: Work("memory", bytes_backward=2.0 * prod(local.output) * local.output_bytes, kernels_forward=0),
        emit=_position_emit,
        context=lambda types, out, weights, attrs: (Strategy("sequence", (shard(1),), (WHOLE_PARTIAL,), shard(0)),),
        imports=("positions",),
        weights=lambda types, attrs: (
            WeightSpec("weight", (integer(attrs, "max"), integer(attrs, "dim")), Init("normal", number(attrs, "std"))),
        ),
    ),
)
