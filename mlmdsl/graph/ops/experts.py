"""Mixture of experts: rows of tokens sorted by the experts that they go to, and one matrix product per expert.

A router is a combination of other operations that ends in gates [B, S, E], zero but for the experts of each token. `route`
turns them into integers, `dispatch` sorts copies of the tokens by expert, `grouped_linear` multiplies each expert's rows by its
own matrix, `combine` puts them back, weighted by the gates. The tensor axis cuts features, never rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from mlmdsl.graph.graph import Scalar
from mlmdsl.graph.ops.base import ContextRule, Local, Op, ShapeProblem, WeightSpec, Work
from mlmdsl.graph.ops.common import input_bytes, output_bytes
from mlmdsl.graph.ops.linear import features, integer, number
from mlmdsl.graph.placement import BROADCAST, PARTIAL, REPLICATE, WHOLE, WHOLE_PARTIAL, Strategy, WeightPlacement, shard
from mlmdsl.graph.tensor import Init, TensorType

Types = tuple[TensorType, ...]
Attributes = Mapping[str, Scalar]
Shapes = tuple[tuple[int, ...], ...]


# ---- types ----------------------------------------------------------------------------------------------------------


def _route_type(types: Types, attrs: Attributes) -> TensorType:
    """Three integers per row and per expert: the symbol of the rows says how many a token has."""
    experts, k = features(types[0]), integer(attrs, "top_k")
    if len(types[0].shape) != 3:
        raise ShapeProblem("MLM0503", f"this wants gates [B, S, experts], not {types[0]}", 0)
    if k > experts:
        raise ShapeProblem("MLM0503", f"a token cannot go to {k} of {experts} experts", 0, help="top_k is at most their number")
    batch, length, _ = types[0].shape
    return TensorType("int", (3, f"{k}*{batch}*{length}+{experts}"))


def _routed(type: TensorType, argument: int) -> tuple[str, int]:
    """The symbol of the rows, and the number of experts."""
    size = type.shape[-1] if len(type.shape) == 2 else ""
    if type.dtype != "int" or not isinstance(size, str) or "+" not in size:
        raise ShapeProblem("MLM0502", f"this wants what route() gives, not {type}", argument)
    rows, experts = size.split("+")
    return rows, int(experts)


def _chosen(type: TensorType) -> int:
    """How many experts a token goes to."""
    return int(_routed(type, 1)[0].split("*")[0])


def _dispatch_type(types: Types, attrs: Attributes) -> TensorType:
    size = features(types[0])
    rows, _ = _routed(types[1], 1)
    _same_tokens(types[0], rows, 0)
    return TensorType("float", (rows, size))


def _same_tokens(type: TensorType, rows: str, argument: int) -> None:
    if len(type.shape) != 3 or list(map(str, type.shape[:2])) != rows.split("*")[1:]:
        tokens = ", ".join(rows.split("*")[1:])
        raise ShapeProblem("MLM0501", f"{type} is not of the tokens [{tokens}] that were routed", argument)


def _grouped_type(types: Types, attrs: Attributes) -> TensorType:
    features(types[0])
    rows, _ = _routed(types[1], 1)
    if types[0].shape[:-1] != (rows,):
        raise ShapeProblem("MLM0501", f"the rows {types[0]} are not those that were routed, [{rows}, ...]", 0)
    return TensorType("float", (rows, integer(attrs, "out")))


def _combine_type(types: Types, attrs: Attributes) -> TensorType:
    size, experts = features(types[0]), features(types[1], 1)
    rows, count = _routed(types[2], 2)
    if types[0].shape[:-1] != (rows,):
        raise ShapeProblem("MLM0501", f"the rows {types[0]} are not those that were routed, [{rows}, ...]", 0)
    _same_tokens(types[1], rows, 1)
    if experts != count:
        raise ShapeProblem("MLM0501", f"the gates {types[1]} are not of {count} experts", 1)
    return TensorType("float", (*types[1].shape[:-1], size))


# ---- strategies -----------------------------------------------------------------------------------------------------


def _dispatch_strategies(types: Types, out: TensorType, weights: Shapes, attrs: Attributes, n: int) -> tuple[Strategy, ...]:
    found = [
        Strategy("replicated", (REPLICATE, REPLICATE), (), REPLICATE),
        Strategy("broadcast", (BROADCAST, REPLICATE), (), BROADCAST),
        Strategy("partial", (PARTIAL, REPLICATE), (), PARTIAL),
    ]
    if features(out) % n == 0:
        found.append(Strategy("sharded", (shard(2), REPLICATE), (), shard(1)))
    return tuple(found)


def _grouped_strategies(types: Types, out: TensorType, weights: Shapes, attrs: Attributes, n: int) -> tuple[Strategy, ...]:
    _, rows, columns = weights[0]
    found = [
        Strategy("replicated", (REPLICATE, REPLICATE), (WHOLE,), REPLICATE),
        Strategy("broadcast", (BROADCAST, REPLICATE), (WHOLE_PARTIAL,), BROADCAST),
    ]
    if rows % n == 0:
        found.append(Strategy("column", (BROADCAST, REPLICATE), (WeightPlacement(1),), shard(1)))
    if columns % n == 0:
        found.append(Strategy("row", (shard(1), REPLICATE), (WeightPlacement(2),), PARTIAL))
    return tuple(found)


def _combine_strategies(types: Types, out: TensorType, weights: Shapes, attrs: Attributes, n: int) -> tuple[Strategy, ...]:
    """A gate's gradient is a product of rows summed over their features: partial where they are partial or cut."""
    found = [
        Strategy("replicated", (REPLICATE, REPLICATE, REPLICATE), (), REPLICATE),
        Strategy("broadcast", (BROADCAST, BROADCAST, REPLICATE), (), BROADCAST),
        Strategy("partial", (PARTIAL, BROADCAST, REPLICATE), (), PARTIAL),
    ]
    if features(out) % n == 0:
        found.append(Strategy("sharded", (shard(1), BROADCAST, REPLICATE), (), shard(2)))
    return tuple(found)


def _on_context(*inputs: int, output: int, weights: int = 0) -> ContextRule:
    """Every rank routes its own tokens: inputs and output are cut along them, in these dims."""
    local = Strategy("sequence", tuple(map(shard, inputs)), (WHOLE_PARTIAL,) * weights, shard(output))
    return lambda types, out, shapes, attrs: (local,)


# ---- costs ----------------------------------------------------------------------------------------------------------


def _route_work(local: Local) -> Work:
    """Two sorts and what is gathered by them, each a few passes over the rows."""
    moved = input_bytes(local) + 8 * output_bytes(local)
    return Work("memory", bytes_forward=moved, kernels_forward=16, kernels_backward=0)


def _dispatch_work(local: Local) -> Work:
    moved = 2 * output_bytes(local)
    return Work("memory", bytes_forward=moved, bytes_backward=1.5 * moved, saved=("in1",), kernels_backward=2)


def _grouped_work(local: Local) -> Work:
    """Every expert's matrix is read; each row is multiplied once."""
    experts, n, k = local.weights[0]
    m = local.inputs[0][0]
    moved = m * k * local.input_bytes[0] + prod(local.weights[0]) * local.weight_bytes + output_bytes(local)
    return Work(
        "matmul",
        flops_forward=2.0 * m * n * k,
        flops_backward=4.0 * m * n * k,
        bytes_forward=moved,
        bytes_backward=2 * moved,
        saved=("in0", "in1"),
        kernels_backward=2,
        matmul=(max(1, m // experts), k, n),
    )


def _combine_work(local: Local) -> Work:
    """Rows are put into the order of tokens on the way forward, and again on the way back, where the gates' gradients are their
    products with the output's."""
    rows = float(prod(local.inputs[0]) * local.input_bytes[0])
    return Work(
        "memory",
        bytes_forward=3 * rows + output_bytes(local),
        bytes_backward=5 * rows + output_bytes(local),
        saved=("in0", "in1", "in2"),
        transient_bytes=rows,
        kernels_forward=4,
        kernels_backward=8,
    )


def _routing_delivered(local: Local) -> tuple[int, int]:
    """How many rows of each expert."""
    return 8 * local.inputs[0][-1], 0


def _rows_delivered(local: Local) -> tuple[int, int]:
    """dispatch: every row to the rank that has its expert, and its gradient back."""
    size = prod(local.output) * local.output_bytes
    return size, size


def _rows_returned(local: Local) -> tuple[int, int]:
    """combine: the other way round."""
    size = prod(local.inputs[0]) * local.input_bytes[0]
    return size, size


def _called(name: str, *arguments: str | None) -> str:
    """The call; the last argument is the expert axis, None where there is none."""
    return f"{name}({', '.join(a for a in arguments if a is not None)})"


OPS = (
    Op(
        name="route",
        doc="Which tokens go to which experts, from gates [B, S, E]: each to those of its first `top_k` gates that are not"
        " zero. Integers without gradient: where each of the top_k * B * S rows, sorted by expert, comes from and goes back"
        " to, its expert, and the count of each expert. A token with fewer gates has rows that go nowhere.",
        infer=_route_type,
        strategies=lambda types, out, weights, attrs, n: (
            Strategy("replicated", (REPLICATE,), (), REPLICATE),
            Strategy("broadcast", (BROADCAST,), (), REPLICATE),
        ),
        context=_on_context(1, output=1),
        work=_route_work,
        emit=lambda e: _called("route", e.inputs[0], str(e.attrs["top_k"]), e.expert),
        imports=("route",),
        deliveries=_routing_delivered,
    ),
    Op(
        name="dispatch",
        doc="Tokens [B, S, d] to rows [top_k * B * S, d] sorted by expert.",
        infer=_dispatch_type,
        strategies=_dispatch_strategies,
        context=_on_context(1, 1, output=0),
        work=_dispatch_work,
        emit=lambda e: _called("dispatch", *e.inputs, str(_chosen(e.input_types[1])), e.expert),
        imports=("dispatch",),
        deliveries=_rows_delivered,
    ),
    Op(
        name="grouped_linear",
        doc="y = x W[e]^T for the rows x of each expert e, W [experts, out, in].",
        infer=_grouped_type,
        strategies=_grouped_strategies,
        context=_on_context(0, 1, output=0, weights=1),
        work=_grouped_work,
        emit=lambda e: _called("grouped_linear", e.inputs[0], e.weights[0], e.inputs[1], e.expert),
        weights=lambda types, attrs: (
            WeightSpec(
                "weight",
                (_routed(types[1], 1)[1], integer(attrs, "out"), features(types[0])),
                Init("normal", number(attrs, "std")),
                expert=True,
            ),
        ),
        imports=("grouped_linear",),
        cheap=False,
        active=lambda types: _chosen(types[1]) / _routed(types[1], 1)[1],
    ),
    Op(
        name="combine",
        doc="Rows back to tokens [B, S, d]: the sum of each token's rows, weighted by its gates [B, S, E].",
        infer=_combine_type,
        strategies=_combine_strategies,
        context=_on_context(0, 1, 1, output=1),
        work=_combine_work,
        emit=lambda e: _called("combine", *e.inputs, e.expert),
        imports=("combine",),
        deliveries=_rows_returned,
    ),
)
