"""Matrix products and their biases.

The bias is an operation of its own: a row-parallel product is a partial sum, and a bias may be added only once the sum is
complete (pytorch/torchtitan #4245). Where nothing lies between them, the emitted program fuses the two into one F.linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from mlmdsl.graph.graph import Scalar
from mlmdsl.graph.ops.base import Emission, Local, Op, ShapeProblem, WeightSpec, Work
from mlmdsl.graph.ops.common import output_bytes, pointwise, shard_name, shardable
from mlmdsl.graph.placement import (
    BROADCAST,
    PARTIAL,
    REPLICATE,
    WHOLE,
    WHOLE_PARTIAL,
    Strategy,
    WeightPlacement,
    shard,
)
from mlmdsl.graph.tensor import Init, TensorType

Types = tuple[TensorType, ...]
Attributes = Mapping[str, Scalar]


def number(attrs: Attributes, name: str) -> float:
    value = attrs[name]
    assert isinstance(value, int | float)
    return float(value)


def integer(attrs: Attributes, name: str) -> int:
    value = attrs[name]
    assert isinstance(value, int)
    return value


def features(type: TensorType, argument: int = 0) -> int:
    """The known size of the last dim of a float tensor."""
    if type.dtype == "int":
        raise ShapeProblem("MLM0502", f"this wants floating-point values, not {type}", argument)
    if not type.shape or not isinstance(type.shape[-1], int):
        raise ShapeProblem("MLM0503", f"the last dim of {type} has no known size", argument)
    return type.shape[-1]


def _linear_type(types: Types, attrs: Attributes) -> TensorType:
    features(types[0])
    return TensorType("float", (*types[0].shape[:-1], integer(attrs, "out")))


def _linear_strategies(
    types: Types, out: TensorType, weights: tuple[tuple[int, ...], ...], attrs: Attributes, n: int
) -> tuple[Strategy, ...]:
    last = len(out.shape) - 1
    rows, columns = weights[0]
    found = [
        Strategy("replicated", (REPLICATE,), (WHOLE,), REPLICATE),
        Strategy("broadcast", (BROADCAST,), (WHOLE_PARTIAL,), BROADCAST),
    ]
    if rows % n == 0:
        found.append(Strategy("column", (BROADCAST,), (WeightPlacement(0),), shard(last)))
    if columns % n == 0:
        found.append(Strategy("row", (shard(last),), (WeightPlacement(1),), PARTIAL))
    for dim in shardable(out, n, besides=(last,)):
        found.append(Strategy(shard_name(out, dim), (shard(dim),), (WHOLE_PARTIAL,), shard(dim)))
    return tuple(found)


def _linear_work(local: Local) -> Work:
    n, k = local.weights[0]
    m = prod(local.inputs[0][:-1])
    moved = (m * k) * local.input_bytes[0] + (n * k) * local.weight_bytes + output_bytes(local)
    return Work(
        "matmul",
        flops_forward=2.0 * m * n * k,
        flops_backward=4.0 * m * n * k,
        bytes_forward=moved,
        bytes_backward=2 * moved,
        saved=("in0",),
        kernels_backward=2,
        matmul=(m, k, n),
    )


def _bias_type(types: Types, attrs: Attributes) -> TensorType:
    features(types[0])
    return types[0]


def _bias_strategies(
    types: Types, out: TensorType, weights: tuple[tuple[int, ...], ...], attrs: Attributes, n: int
) -> tuple[Strategy, ...]:
    last = len(out.shape) - 1
    found = (*pointwise(types, out, n, 1, besides=(last,)), Strategy("shared", (PARTIAL,), (WHOLE_PARTIAL,), PARTIAL))
    cut = isinstance(out.shape[last], int) and weights[0][0] % n == 0
    return (*found, Strategy("column", (shard(last),), (WeightPlacement(0),), shard(last))) if cut else found


def _bias_work(local: Local) -> Work:
    """The addition is the epilogue of a matrix product or of what reduces it; the backward pass sums over the tokens."""
    return Work("memory", bytes_backward=output_bytes(local), kernels_forward=0)


def _bias_text(e: Emission) -> str:
    """To a partial sum every rank adds its share."""
    return f"{e.inputs[0]} + {e.weights[0]}" + (f" / {e.axis_size}" if e.strategy.name == "shared" else "")


OPS = (
    Op(
        name="linear",
        doc="y = x W^T for W [out, in]; the bias is an operation of its own.",
        infer=_linear_type,
        strategies=_linear_strategies,
        work=_linear_work,
        emit=lambda e: f"F.linear({', '.join([e.inputs[0], *e.weights])})",
        weights=lambda types, attrs: (
            WeightSpec("weight", (integer(attrs, "out"), features(types[0])), Init("normal", number(attrs, "std"))),
        ),
        cheap=False,
    ),
    Op(
        name="bias",
        doc="x + b for b [d].",
        infer=_bias_type,
        strategies=_bias_strategies,
        work=_bias_work,
        emit=_bias_text,
        weights=lambda types, attrs: (WeightSpec("bias", (features(types[0]),), Init("zeros"), decay=False),),
    ),
)
