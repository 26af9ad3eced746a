"""Normalisation over the last dim."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from mlmdsl.graph.graph import Scalar
from mlmdsl.graph.ops.base import Emission, Op, WeightSpec
from mlmdsl.graph.ops.common import memory_bound, pointwise
from mlmdsl.graph.ops.linear import features, number
from mlmdsl.graph.placement import Strategy
from mlmdsl.graph.tensor import Init, TensorType

Types = tuple[TensorType, ...]
Attributes = Mapping[str, Scalar]


def _type(types: Types, attrs: Attributes) -> TensorType:
    features(types[0])
    return types[0]


def _strategies(
    types: Types, out: TensorType, weights: tuple[tuple[int, ...], ...], attrs: Attributes, n: int
) -> tuple[Strategy, ...]:
    return pointwise(types, out, n, len(weights), besides=(len(out.shape) - 1,))


def _layer_weights(types: Types, attrs: Attributes) -> tuple[WeightSpec, ...]:
    shape = (features(types[0]),)
    scale = WeightSpec("weight", shape, Init("ones"), decay=False)
    return (scale, WeightSpec("bias", shape, Init("zeros"), decay=False)) if attrs["bias"] else (scale,)


def _layer_emit(e: Emission) -> str:
    size = e.output_type.shape[-1]
    eps = number(e.attrs, "eps")
    weights = [*e.weights, "None"][:2] if eps != 1e-5 else list(e.weights)
    return f"F.layer_norm({', '.join([e.inputs[0], f'({size},)', *weights, *([repr(eps)] if eps != 1e-5 else [])])})"


OPS = (
    Op(
        name="layer_norm",
        doc="Layer normalisation (arXiv:1607.06450) with weight and, unless `bias = false`, bias.",
        infer=_type,
        strategies=_strategies,
        work=lambda local: memory_bound(local, ("in0",), extra=8.0 * prod(local.inputs[0][:-1])),
        emit=_layer_emit,
        weights=_layer_weights,
    ),
    Op(
        name="rms_norm",
        doc="Root-mean-square normalisation (arXiv:1910.07467).",
        infer=_type,
        strategies=_strategies,
        work=lambda local: memory_bound(local, ("in0",), extra=4.0 * prod(local.inputs[0][:-1])),
        emit=lambda e: f"F.rms_norm({e.inputs[0]}, ({e.output_type.shape[-1]},), {e.weights[0]}, {number(e.attrs, 'eps')!r})",
        weights=lambda types, attrs: (WeightSpec("weight", (features(types[0]),), Init("ones"), decay=False),),
    ),
)
