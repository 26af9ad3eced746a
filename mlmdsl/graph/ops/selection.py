"""Choosing among, adding up, cutting and joining the values of the last dim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mlmdsl.graph.graph import Scalar
from mlmdsl.graph.ops.base import Emission, Op, ShapeProblem, WeightSpec, Work
from mlmdsl.graph.ops.common import elements, input_bytes, memory_bound, partial, pointwise, shard_name, shardable
from mlmdsl.graph.ops.linear import features, integer, number
from mlmdsl.graph.placement import BROADCAST, PARTIAL, REPLICATE, WHOLE, Strategy, shard
from mlmdsl.graph.tensor import Init, TensorType

Types = tuple[TensorType, ...]
Attributes = Mapping[str, Scalar]
Shapes = tuple[tuple[int, ...], ...]


# ---- the k largest --------------------------------------------------------------------------------------------------


def _top_k_type(types: Types, attrs: Attributes) -> TensorType:
    x, by = types[0], types[-1]
    count, k = features(x), integer(attrs, "k")
    if by.shape != x.shape:
        raise ShapeProblem("MLM0501", f"the values {x} and what they are chosen by, {by}, do not fit together", 1)
    groups, limit = integer(attrs, "groups"), attrs["group_limit"]
    if count % groups:
        raise ShapeProblem("MLM0503", f"{groups} groups cannot share {count} values", 0, help="groups has to divide them")
    within = count if limit is None else count // groups * min(groups, integer(attrs, "group_limit"))
    if k > within:
        raise ShapeProblem("MLM0503", f"{k} of {within} values cannot be chosen", 0, help="k is at most their number")
    return x


def _top_k_emit(e: Emission) -> str:
    options = [f"by={by}" for by in e.inputs[1:]]
    options += [f"fill={number(e.attrs, 'fill')!r}"] if e.attrs.get("fill") else []
    if e.attrs["group_limit"] is not None and integer(e.attrs, "group_limit") < integer(e.attrs, "groups"):
        options += [f"{name}={e.attrs[name]}" for name in ("groups", "group_limit", "group_best")]
    name = ", ".join([f"balanced_top_k({e.inputs[0]}", *e.weights]) if e.weights else f"top_k({e.inputs[0]}"
    return f"{', '.join([name, str(e.attrs['k']), *options])})"


def _balanced_strategies(types: Types, out: TensorType, weights: Shapes, attrs: Attributes, n: int) -> tuple[Strategy, ...]:
    """The bias' gradient is a count of this rank's tokens, whatever the gradient of the values is."""
    found = pointwise(types, out, n, 1, besides=(len(out.shape) - 1,))
    return tuple(replace(s, weights=(WHOLE,)) if s.output == BROADCAST else s for s in found)


# ---- sums -----------------------------------------------------------------------------------------------------------


def _sum_type(types: Types, attrs: Attributes) -> TensorType:
    x = types[0]
    features(x)
    return TensorType(x.dtype, (*x.shape[:-1], 1) if attrs["keep"] else x.shape[:-1])


def _sum_strategies(types: Types, out: TensorType, weights: Shapes, attrs: Attributes, n: int) -> tuple[Strategy, ...]:
    last = len(types[0].shape) - 1
    found = [
        Strategy("replicated", (REPLICATE,), (), REPLICATE),
        Strategy("broadcast", (BROADCAST,), (), BROADCAST),
        partial(1),
    ]
    for dim in shardable(types[0], n):
        whole = PARTIAL if dim == last else shard(dim)
        found.append(Strategy(shard_name(types[0], dim), (shard(dim),), (), whole))
    return tuple(found)


# ---- parts ----------------------------------------------------------------------------------------------------------


def _concat_type(types: Types, attrs: Attributes) -> TensorType:
    """Shapes but for the last dim broadcast where they are 1."""
    x, y = types
    size = features(x) + features(y, 1)
    pairs = list(zip(x.shape[:-1], y.shape[:-1], strict=len(x.shape) == len(y.shape)))
    if len(x.shape) != len(y.shape) or any(a != b and 1 not in (a, b) for a, b in pairs):
        raise ShapeProblem(
            "MLM0501", f"the shapes {x} and {y} do not fit together", 1, help="all but the last dim agree, or are 1"
        )
    return TensorType("float", (*(b if a == 1 else a for a, b in pairs), size))


def _part_type(types: Types, attrs: Attributes) -> TensorType:
    count, size = features(types[0]), integer(attrs, "size")
    if size > count:
        raise ShapeProblem("MLM0503", f"{types[0]} has no {size} features", 0)
    return TensorType(types[0].dtype, (*types[0].shape[:-1], size))


def _rowwise(types: Types, out: TensorType, weights: Shapes, attrs: Attributes, n: int) -> tuple[Strategy, ...]:
    """The last dim has to be whole."""
    return (*pointwise(types, out, n, 0, besides=(len(out.shape) - 1,)), partial(len(types)))


def _part(name: str, doc: str, text: str) -> Op:
    return Op(
        name=name,
        doc=doc,
        infer=_part_type,
        strategies=_rowwise,
        work=lambda local: Work("none", kernels_forward=0, kernels_backward=1, bytes_backward=2 * input_bytes(local)),
        emit=lambda e: text.format(x=e.inputs[0], n=e.attrs["size"]),
    )


OPS = (
    _part("first", "The first `size` features of the last dim.", "{x}[..., :{n}]"),
    _part("last", "The last `size` features of the last dim.", "{x}[..., -{n}:]"),
    Op(
        name="concat",
        doc="The features of y behind those of x; the other dims broadcast where they are 1, as from one head to all.",
        infer=_concat_type,
        strategies=_rowwise,
        work=lambda local: memory_bound(local, backward=1.0),
        emit=lambda e: f"concat({', '.join(e.inputs)})",
        imports=("concat",),
    ),
    Op(
        name="top_k",
        doc="x where `by` (x itself unless given) is among its k largest of the last dim, `fill` elsewhere; of equal values the"
        " first. With `group_limit` only the values of that many of `groups` equal groups are eligible: those whose"
        " `group_best` largest have the largest sum (arXiv:2412.19437, section 2.1.2). The choice has no gradient.",
        infer=_top_k_type,
        strategies=lambda types, out, weights, attrs, n: pointwise(types, out, n, 0, besides=(len(out.shape) - 1,)),
        work=lambda local: memory_bound(local, extra=float(elements(local.output)), kernels=5, backward=1.0),
        emit=_top_k_emit,
        imports=("top_k",),
    ),
    Op(
        name="balanced_top_k",
        doc="top_k by x plus a bias, which balances how often each of the last dim's values is chosen (arXiv:2408.15664): it"
        " has no part in the values, and each step moves it by `rate`, down where one was chosen more often than on average"
        " in the global batch, up where less often. It counts as no parameter and is in checkpoints.",
        infer=_top_k_type,
        strategies=_balanced_strategies,
        work=lambda local: memory_bound(local, extra=float(elements(local.output)), kernels=8, backward=1.0),
        emit=_top_k_emit,
        weights=lambda types, attrs: (
            WeightSpec("bias", (features(types[0]),), Init("zeros"), decay=False, balance=number(attrs, "rate")),
        ),
        imports=("balanced_top_k",),
    ),
    Op(
        name="sum",
        doc="Sum over the last dim; with `keep` a dim of 1 stays in its place.",
        infer=_sum_type,
        strategies=_sum_strategies,
        work=lambda local: memory_bound(local, backward=1.0),
        emit=lambda e: f"{e.inputs[0]}.sum(-1{', keepdim=True' if e.attrs['keep'] else ''})",
    ),
)
