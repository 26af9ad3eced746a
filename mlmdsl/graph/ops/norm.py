"""Normalisation over the last dim."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from mlmdsl.graph.graph import Scalar
from mlmdsl.graph.ops.base import Emission, Local, Op, WeightSpec, Work
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
    shift = (WeightSpec("bias", shape, Init("zeros"), decay=False),) if attrs["bias"] else ()
    return (scale, *shift) if attrs["affine"] else ()


def _layer_emit(e: Emission) -> str:
    eps = number(e.attrs, "eps")
    weights = [*e.weights, "None", "None"][:2] if eps != 1e-5 else list(e.weights)
    return f"F.layer_norm({', '.join([e.inputs[0], f'({_size(e)},)', *weights, *([repr(eps)] if eps != 1e-5 else [])])})"


def _rms_weights(types: Types, attrs: Attributes) -> tuple[WeightSpec, ...]:
    if not attrs["affine"]:
        return ()
    start = Init("zeros" if number(attrs, "offset") else "ones")
    return (WeightSpec("weight", (features(types[0]),), start, decay=False),)


def _rms_emit(e: Emission) -> str:
    offset = number(e.attrs, "offset")
    weight = e.weights[0] if e.weights else "None"
    weight = f"{offset!r} + {weight}" if offset and e.weights else weight
    return f"F.rms_norm({e.inputs[0]}, ({_size(e)},), {weight}, {number(e.attrs, 'eps')!r})"


def _work(local: Local, each_row: float) -> Work:
    """Saves the input and `each_row` bytes. The gradient of the input reads it and that of the output; those of the weights are
    kernels of their own, which read both again (aten/src/ATen/native/cuda/layer_norm_kernel.cu), in the same call."""
    extra, backward = each_row * prod(local.inputs[0][:-1]), 2.5 if local.weights else 1.5
    return memory_bound(local, ("in0",), extra=extra, backward=backward)


def _size(e: Emission) -> int | str:
    return e.output_type.shape[-1]


OPS = (
    Op(
        name="layer_norm",
        doc="Layer normalisation (arXiv:1607.06450) with weight and, unless `bias = false`, bias; with neither if"
        " `affine = false`.",
        infer=_type,
        strategies=_strategies,
        work=lambda local: _work(local, 8.0),
        emit=_layer_emit,
        weights=_layer_weights,
    ),
    Op(
        name="rms_norm",
        doc="Root-mean-square normalisation (arXiv:1910.07467), times `offset` + weight; the weight starts at one, or at zero"
        " beside an offset. No weight if `affine = false`.",
        infer=_type,
        strategies=_strategies,
        work=lambda local: _work(local, 4.0),
        emit=_rms_emit,
        weights=_rms_weights,
    ),
)
